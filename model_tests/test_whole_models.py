"""Models of transformers, each whole as one stage that is compiled in one piece, against eager backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from copied_layers import counted_copies
from torch import Tensor, nn

import funcstage as fs

VOCABULARY = 40
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "use_cache": False,
}
BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "decoder_start_token_id": 2,
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
GROUPS = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_key_value_heads": 2}

Models = dict[str, tuple[str, dict[str, Any]]]
DECODERS: Models = {
    "Bloom": ("BloomForCausalLM", {"n_layer": 2, "n_head": 2}),
    "Cohere": ("CohereForCausalLM", {}),
    "Gemma 2": ("Gemma2ForCausalLM", {}),
    "Gemma 3": ("Gemma3ForCausalLM", {}),
    "GLM-4": ("Glm4ForCausalLM", {}),
    "GPT-J": ("GPTJForCausalLM", {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", {}),
    "Granite": ("GraniteForCausalLM", {}),
    "LFM2": ("Lfm2ForCausalLM", {}),
    "Llama": ("LlamaForCausalLM", {}),
    "Mamba": ("MambaForCausalLM", {"state_size": 4, "time_step_rank": 4}),
    "Mamba 2": ("Mamba2ForCausalLM", {"state_size": 4, "num_heads": 4, "n_groups": 1, "chunk_size": 4}),
    "Mistral": ("MistralForCausalLM", {"sliding_window": 4}),
    "MPT": ("MptForCausalLM", {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64}),
    "Nemotron": ("NemotronForCausalLM", {}),
    "OLMo 2": ("Olmo2ForCausalLM", {}),
    "OPT": ("OPTForCausalLM", {"ffn_dim": 32, "word_embed_proj_dim": 16}),
    "Phi": ("PhiForCausalLM", {}),
    "Phi-3": ("Phi3ForCausalLM", {}),
    "Qwen2": ("Qwen2ForCausalLM", {}),
    "RecurrentGemma": ("RecurrentGemmaForCausalLM", {"lru_width": 16}),
    "SmolLM3": ("SmolLM3ForCausalLM", {}),
    "StableLM": ("StableLmForCausalLM", {}),
    "StarCoder2": ("Starcoder2ForCausalLM", {}),
}
ENCODERS: Models = {
    "ALBERT": ("AlbertForMaskedLM", {"embedding_size": 16}),
    "BART": ("BartForConditionalGeneration", {**BART, "forced_eos_token_id": 2}),
    "BigBird": ("BigBirdForMaskedLM", {"attention_type": "original_full"}),
    "DeBERTa-v2": ("DebertaV2ForMaskedLM", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "DistilBERT": ("DistilBertForMaskedLM", {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2}),
    "ELECTRA": ("ElectraForMaskedLM", {"embedding_size": 16}),
    "ModernBERT": ("ModernBertForMaskedLM", {"local_attention": 4}),
    "RoBERTa": ("RobertaForMaskedLM", {}),
}
EXPERTS: Models = {
    "DeepSeek-V2": ("DeepseekV2ForCausalLM", {**ROUTED, **LATENT, **GROUPS}),
    "DeepSeek-V3": (
        "DeepseekV3ForCausalLM",
        {**ROUTED, **LATENT, **GROUPS, "n_shared_experts": 1, "first_k_dense_replace": 1},
    ),
    "gpt-oss": ("GptOssForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Granite, experts": ("GraniteMoeForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "OLMoE": ("OlmoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2-MoE": (
        "Qwen2MoeForCausalLM",
        {**ROUTED, "num_experts": 4, "shared_expert_intermediate_size": 16},
    ),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", {**ROUTED, "num_experts": 4}),
}
ENGINES = ("closures", "aten")


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        return self.model(input_ids=tokens, attention_mask=mask).logits


def check_split(model: nn.Module, padded: bool, engine: str, rtol: float) -> None:
    """Compare a model's split with eager backward, which has drawn the same dropout.

    Gradients are compared relative to the largest of the model, as sums may be taken in another order, and
    some are sums that are zero but for rounding, as of the biases of keys.
    """
    module = Logits(model)
    tokens = torch.randint(3, VOCABULARY, (2, 8))
    mask = (torch.arange(8) < torch.tensor([[5], [8]])).long() if padded else None
    torch.manual_seed(1)
    expected = module(tokens, mask)
    state = torch.get_rng_state()
    cotangent = torch.randn_like(expected)
    weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    gradients = torch.autograd.grad(expected, [*weights.values()], cotangent, allow_unused=True)

    apply, params, buffers = fs.functionalize(module)
    stage: Any = fs.compile(apply, backend="aten", fullgraph=True) if engine == "aten" else apply
    torch.manual_seed(1)
    output, _, pullback = fs.stage_vjp(stage, params, buffers, tokens, mask)
    assert torch.equal(torch.get_rng_state(), state)
    found = pullback(cotangent)[1]()

    torch.testing.assert_close(output, expected, rtol=0.0, atol=rtol * float(expected.detach().abs().max()))
    atol = rtol * max(float(gradient.abs().max()) for gradient in gradients if gradient is not None)
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        # what no token has reached, an expert or a pooler, has a gradient of zeros, or none
        none = torch.zeros_like(weight)
        ours, eagers = (none if grad is None else grad for grad in (found[name], gradient))
        torch.testing.assert_close(ours, eagers, rtol=0.0, atol=atol)


def build(kind: str, options: dict[str, Any], dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, kind)
    return model(model.config_class(**{**SIZES, **options})).to(dtype).train()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_a_model_is_split_whole(name: str, padded: bool, engine: str, table: Callable[..., None]) -> None:
    model = build(*{**DECODERS, **ENCODERS}[name], torch.float32)
    of_row = ", ".join([name, *["padded"] * padded])
    attention = model.config._attn_implementation
    table(library="transformers", model=of_row, stages="whole", attention=attention, engine=engine)
    check_split(model, padded, engine, rtol=1e-5)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["GPT-NeoX", "Llama", "OPT", "Qwen2", "RoBERTa"])
def test_one_layer_of_a_model_is_traced(name: str, train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They differ in their numbers, which they read for caches only; some draw dropout in training."""
    kind, options = {**DECODERS, **ENCODERS}[name]
    model = build(kind, {**options, "num_hidden_layers": 5}, torch.float32).train(train)
    copies = counted_copies(monkeypatch)
    check_split(model, True, "aten", rtol=1e-5)
    assert copies == [4]


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "gradient checkpointing"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("name", EXPERTS)
def test_a_mixture_of_experts_is_split_whole_with_the_experts_it_comes_with(
    name: str, dtype: torch.dtype, rtol: float, engine: str, checkpointed: bool, table: Callable[..., None]
) -> None:
    model = build(*EXPERTS[name], dtype)
    if checkpointed:
        model.activation_checkpointing_enable()
    of_row = ", ".join([name, str(dtype).removeprefix("torch."), *["gradient checkpointing"] * checkpointed])
    attention = model.config._attn_implementation
    table(library="transformers", model=of_row, stages="whole", attention=attention, engine=engine)
    check_split(model, False, engine, rtol)
