"""torchvision's image models, their blocks left whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models
from training import BATCH, ENGINES, check_two_steps

from funcstage.pipelining import cut


def densenet(memory_efficient: bool = False) -> nn.Module:
    return models.DenseNet(
        4, (2, 2, 2, 2), num_init_features=8, bn_size=2, num_classes=5, memory_efficient=memory_efficient
    )


DENSE_CUTS = ["features.transition1", "features.denseblock3", "features.transition3"]
LAYERS = "encoder.layers.encoder_layer_"
MODELS: dict[str, tuple[Callable[[], nn.Module], list[str], int]] = {
    "resnet18": (lambda: models.resnet18(num_classes=5), ["layer2", "layer3.1", "layer4"], 32),
    "mobilenet_v3_small": (
        lambda: models.mobilenet_v3_small(num_classes=5, dropout=0.0),
        ["features.3", "features.6", "features.10"],
        32,
    ),
    "DenseNet": (densenet, DENSE_CUTS, 32),
    "VisionTransformer": (
        lambda: models.VisionTransformer(32, 8, num_layers=4, num_heads=2, hidden_dim=16, mlp_dim=32),
        [f"{LAYERS}{i}" for i in (1, 2, 3)],
        32,
    ),
    "SwinTransformer": (
        lambda: models.SwinTransformer(
            [4, 4], 8, [1, 1, 1, 1], [1, 1, 2, 2], [4, 4], stochastic_depth_prob=0.0, num_classes=5
        ),
        ["features.2", "features.4", "features.6"],
        64,
    ),
    "GoogLeNet": (
        lambda: models.GoogLeNet(5, aux_logits=False, init_weights=True, dropout=0.0),
        ["inception3b", "inception4b", "inception5a"],
        64,
    ),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_two_steps_of_the_pipeline_are_those_of_the_model(name: str, engine: str, table: Any) -> None:
    table(library="torchvision", model=name, stages="cut", engine=engine)
    build, at, size = MODELS[name]
    torch.manual_seed(0)
    model = build().double()
    inputs = {"x": torch.randn(BATCH, 3, size, size, dtype=torch.float64)}
    check_two_steps(model, cut(model, at), inputs, lambda output: output, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_batch_norms_under_checkpointing_are_those_of_the_model_without(engine: str, table: Any) -> None:
    # In eager mode running statistics are updated a second time when a checkpointed region is run again.
    table(library="torchvision", model="DenseNet, gradient checkpointing", stages="cut", engine=engine)
    torch.manual_seed(0)
    model, whole = densenet(memory_efficient=True).double(), densenet().double()
    whole.load_state_dict(model.state_dict())
    inputs = {"x": torch.randn(BATCH, 3, 32, 32, dtype=torch.float64)}
    stages = cut(model, DENSE_CUTS)
    check_two_steps(model, stages, inputs, lambda output: output, engine=engine, whole=whole)
