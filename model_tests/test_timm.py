"""timm's image models, their blocks left whole."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from training import BATCH, ENGINES, check_two_steps

from funcstage.pipelining import cut

MODELS: dict[str, tuple[dict[str, Any], list[str], int]] = {
    "resnet18": ({}, ["layer2", "layer3.1", "layer4"], 32),
    "convnext_atto": (
        {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
        ["stages.1", "stages.2", "stages.3"],
        64,
    ),
    "vit_tiny_patch16_224": (
        {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2},
        ["blocks.1", "blocks.2", "blocks.3"],
        32,
    ),
    "swin_tiny_patch4_window7_224": (
        {
            "img_size": 64,
            "window_size": 4,
            "embed_dim": 8,
            "depths": (1, 2, 1, 1),
            "num_heads": (1, 1, 2, 2),
            "drop_path_rate": 0.0,
        },
        ["layers.1", "layers.1.blocks.1", "layers.2"],
        64,
    ),
}
CASES = [(name, "") for name in ("resnet18", "convnext_atto")] + [
    (name, attention)
    for name in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224")
    for attention in ("eager", "sdpa")
]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_two_steps_of_the_pipeline_are_those_of_the_model(
    name: str, attention: str, engine: str, table: Any
) -> None:
    table(library="timm", model=name, stages="cut", attention=attention, engine=engine)
    options, at, size = MODELS[name]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options).double().train()
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = attention == "sdpa"
    inputs = {"x": torch.randn(BATCH, 3, size, size, dtype=torch.float64)}
    check_two_steps(model, cut(model, at), inputs, lambda output: output, engine=engine)
