"""transformers' models: through torch.export, and as stages written by hand out of their blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn
from training import BATCH, ENGINES, STAGES, Inputs, check_two_steps, microbatches
from transformers.masking_utils import create_causal_mask
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import funcstage as fs
from funcstage.pipelining import CutError, cut

VOCABULARY = 40
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": STAGES,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Model(NamedTuple):
    """How to build a model, where to cut it, and what to feed it."""

    build: Callable[..., nn.Module]
    at: list[str]
    inputs: Callable[[], Inputs]


def tokens(length: int = 8) -> Tensor:
    return torch.randint(VOCABULARY, (BATCH, length))


def text() -> Inputs:
    return {"input_ids": tokens()}


def padded_text() -> Inputs:
    lengths = torch.randint(4, 9, (BATCH, 1))
    return {"input_ids": tokens(), "attention_mask": (torch.arange(8) < lengths).long()}


def llama(**options: Any) -> nn.Module:
    config = transformers.LlamaConfig(**DECODER, num_key_value_heads=1, use_cache=False, **options)
    return transformers.LlamaForCausalLM(config)


def qwen(**options: Any) -> nn.Module:
    config = transformers.Qwen3Config(
        **DECODER, head_dim=8, num_key_value_heads=1, use_cache=False, tie_word_embeddings=True, **options
    )
    return transformers.Qwen3ForCausalLM(config)


def mixtral(experts: str = "batched_mm", **options: Any) -> nn.Module:
    """Make one whose experts may be in float64."""
    config = transformers.MixtralConfig(
        **DECODER, num_key_value_heads=1, num_local_experts=4, use_cache=False, **options
    )
    config._experts_implementation = experts
    return transformers.MixtralForCausalLM(config)


def gpt2(**options: Any) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=16,
        n_layer=STAGES,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    return transformers.GPT2LMHeadModel(config)


def bert(**options: Any) -> nn.Module:
    config = transformers.BertConfig(**DECODER, **NO_DROPOUT, **options)
    return transformers.BertForMaskedLM(config)


def t5(**options: Any) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        use_cache=False,
        **options,
    )
    return transformers.T5ForConditionalGeneration(config)


def vit(**options: Any) -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=STAGES,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        num_labels=5,
        **NO_DROPOUT,
        **options,
    )
    return transformers.ViTForImageClassification(config)


def whisper(**options: Any) -> nn.Module:
    config = transformers.WhisperConfig(
        d_model=16,
        encoder_layers=STAGES,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=10,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        encoder_layerdrop=0.0,
        **options,
    )
    return WhisperEncoder(config)


def floats(*shape: int) -> Tensor:
    return torch.randn(BATCH, *shape, dtype=torch.float64)


def before(layers: str) -> list[str]:
    return [f"{layers}.{i}" for i in range(1, STAGES)]


MODELS = {
    "Llama": Model(llama, before("model.layers"), text),
    "Qwen3, tied": Model(qwen, before("model.layers"), text),
    "Mixtral, batched experts": Model(mixtral, before("model.layers"), text),
    "GPT-2, tied": Model(gpt2, before("transformer.h"), text),
    "BERT, padded, tied": Model(bert, before("bert.encoder.layer"), padded_text),
    "T5, encoder and decoder, tied": Model(
        t5,
        ["encoder.block.1", "decoder.block.0", "decoder.block.1"],
        lambda: {"input_ids": tokens(), "decoder_input_ids": tokens(6)},
    ),
    "ViT": Model(vit, before("vit.layers"), lambda: {"pixel_values": floats(3, 16, 16)}),
    "Whisper encoder": Model(whisper, before("layers"), lambda: {"input_features": floats(8, 20)}),
}


class DecoderStage(nn.Module):
    """One layer of a decoder such as Llama; the first one embeds, the last one has the head."""

    def __init__(self, whole: Any, i: int) -> None:
        super().__init__()
        self.config = whole.config
        self.embed_tokens = whole.model.embed_tokens if i == 0 else None
        self.rotary_emb = whole.model.rotary_emb
        self.layer = whole.model.layers[i]
        self.head = nn.Sequential(whole.model.norm, whole.lm_head) if i == STAGES - 1 else None

    def forward(self, x: Tensor) -> Any:
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)
        positions = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config, inputs_embeds=x, attention_mask=None, past_key_values=None
        )
        rotary = self.rotary_emb(x, position_ids=positions)
        x = self.layer(x, attention_mask=mask, position_embeddings=rotary, position_ids=positions)
        return x if self.head is None else {"logits": self.head(x)}


def read(output: Any) -> Tensor:
    return output["logits"] if "logits" in output else output["last_hidden_state"]


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_two_steps_of_a_cut_model_are_those_of_the_model(
    name: str, attention: str, engine: str, table: Any
) -> None:
    table(library="transformers", model=name, stages="cut", attention=attention, engine=engine)
    torch.manual_seed(0)
    build, at, make = MODELS[name]
    model = build(attn_implementation=attention).double().train()
    inputs = make()
    stages = cut(model, at, kwargs=microbatches(inputs)[0])
    check_two_steps(model, stages, inputs, read, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_two_steps_of_llama_in_stages_written_by_hand_are_those_of_the_model(
    attention: str, engine: str, table: Any
) -> None:
    table(library="transformers", model="Llama", stages="by hand", attention=attention, engine=engine)
    torch.manual_seed(0)
    model = llama(attn_implementation=attention).double().train()
    stages = [DecoderStage(model, i) for i in range(STAGES)]
    check_two_steps(model, stages, text(), read, engine=engine)


GROUPED = "Mixtral, grouped experts, float32"  # the default experts, which have no kernel for float64


@pytest.mark.parametrize(
    ("stages", "engine"), [("cut", "closures"), ("cut", "aten"), ("by hand", "closures")]
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_grouped_experts_train_in_float32(attention: str, stages: str, engine: str, table: Any) -> None:
    table(library="transformers", model=GROUPED, stages=stages, attention=attention, engine=engine)
    torch.manual_seed(0)
    model = mixtral("grouped_mm", attn_implementation=attention).train()
    inputs = text()
    parts = (
        cut(model, before("model.layers"), kwargs=microbatches(inputs)[0])
        if stages == "cut"
        else [DecoderStage(model, i) for i in range(STAGES)]
    )
    check_two_steps(model, parts, inputs, read, engine=engine, rtol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_grouped_experts_are_refused_in_float32_where_torch_cannot_trace_them(
    attention: str, table: Any
) -> None:
    table(library="transformers", model=GROUPED, stages="by hand", attention=attention, engine="aten")
    table(refused="refused: torch traces its grouped_mm in bfloat16 alone")
    model = mixtral("grouped_mm", attn_implementation=attention).train()
    stages = [DecoderStage(model, i) for i in range(STAGES)]
    with pytest.raises(fs.StageError, match=r"cannot be traced.*BFloat16"):
        check_two_steps(model, stages, text(), read, engine="aten", rtol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_experts_chosen_by_values_train_in_stages_written_by_hand(attention: str, table: Any) -> None:
    where = {"model": "Mixtral, a loop over experts", "stages": "by hand", "attention": attention}
    table(library="transformers", **where, engine="closures")
    torch.manual_seed(0)
    model = mixtral("eager", attn_implementation=attention).double().train()
    stages = [DecoderStage(model, i) for i in range(STAGES)]
    check_two_steps(model, stages, text(), read, engine="closures")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_experts_chosen_by_values_are_compiled_apart(attention: str, table: Any) -> None:
    where = {"model": "Mixtral, a loop over experts", "stages": "by hand", "attention": attention}
    table(library="transformers", **where, engine="aten")
    model = mixtral("eager", attn_implementation=attention).double().train()
    with pytest.raises(CutError, match=r"torch.export cannot trace it: .*data-dependent"):
        cut(model, before("model.layers"), kwargs=microbatches(text())[0])
    stages = [DecoderStage(model, i) for i in range(STAGES)]
    with pytest.warns(UserWarning, match="reads the value of a tensor"):
        check_two_steps(model, stages, text(), read, engine="aten")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("build", [llama, mixtral])
def test_layers_under_gradient_checkpointing_train_as_the_model_does(
    build: Callable[..., Any], attention: str, engine: str, table: Any
) -> None:
    name = {llama: "Llama", mixtral: "Mixtral, batched experts"}[build]
    table(library="transformers", model=f"{name}, gradient checkpointing", stages="by hand")
    table(attention=attention, engine=engine)
    torch.manual_seed(0)
    model = build(attn_implementation=attention).double().train()
    model.activation_checkpointing_enable()
    stages = [DecoderStage(model, i) for i in range(STAGES)]
    check_two_steps(model, stages, text(), read, engine=engine)
