"""Mixtures of experts of transformers, whole, with the experts they come with, against eager backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import funcstage as fs

VOCABULARY = 40
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
ROUTED = {**DECODER, "num_experts_per_tok": 2}


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**ROUTED, num_key_value_heads=1, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def qwen3() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        **ROUTED, head_dim=8, num_key_value_heads=1, num_experts=4, moe_intermediate_size=16
    )
    return transformers.Qwen3MoeForCausalLM(config)


def deepseek() -> nn.Module:
    config = transformers.DeepseekV3Config(
        **ROUTED,
        num_key_value_heads=2,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(**ROUTED, head_dim=8, num_key_value_heads=1, num_local_experts=4)
    return transformers.GptOssForCausalLM(config)


MODELS = {"Mixtral": mixtral, "Qwen3-MoE": qwen3, "DeepSeek-V3": deepseek, "gpt-oss": gpt_oss}


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).logits


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "gradient checkpointing"])
@pytest.mark.parametrize("engine", ["closures", "aten"])
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("name", MODELS)
def test_a_mixture_of_experts_is_split_whole(
    name: str, dtype: torch.dtype, rtol: float, engine: str, checkpointed: bool, table: Callable[..., None]
) -> None:
    torch.manual_seed(0)
    model: Any = MODELS[name]().to(dtype).train()
    if checkpointed:
        model.activation_checkpointing_enable()
    of_row = ", ".join([name, str(dtype).removeprefix("torch."), *["gradient checkpointing"] * checkpointed])
    attention = model.config._attn_implementation
    table(library="transformers", model=of_row, stages="whole", attention=attention, engine=engine)
    module = Logits(model)
    tokens = torch.randint(VOCABULARY, (2, 8))
    expected = module(tokens)
    cotangent = torch.randn_like(expected)
    weights = dict(module.named_parameters())
    gradients = torch.autograd.grad(expected, [*weights.values()], cotangent, allow_unused=True)

    apply, params, buffers = fs.functionalize(module)
    stage: Any = fs.compile(apply, backend="aten", fullgraph=True) if engine == "aten" else apply
    output, _, pullback = fs.stage_vjp(stage, params, buffers, tokens)
    found = pullback(cotangent)[1]()

    assert_close(output, expected, rtol)
    for key, gradient in zip(weights, gradients, strict=True):
        # an expert that no token has chosen has a gradient of zeros, or none
        assert_close(found[key], torch.zeros_like(weights[key]) if gradient is None else gradient, rtol)


def assert_close(found: Tensor, expected: Tensor, rtol: float) -> None:
    """Compare relative to the largest element: sums of experts may be taken in another order."""
    torch.testing.assert_close(found, expected, rtol=0.0, atol=rtol * float(expected.detach().abs().max()))
