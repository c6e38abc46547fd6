"""`examples/transformers_pipeline.py` on gloo, against plain training of the whole model on one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tokenizers
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import funcstage as fs

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
sys.path.append(str(Path(__file__).parents[1] / "examples"))

import transformers_pipeline as example
from pipeline_ranks import run

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "transformers_pipeline.py"
SMALL = ["--steps=3", "--context=16"]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
"""For gradients in float64, of models whose norms and losses are computed in float32 nevertheless."""

STEPPED = {"rtol": 0.0, "atol": 0.03 * example.LEARNING_RATE}
"""For parameters: AdamW takes whole steps by the smallest gradients, too."""

pytestmark = pytest.mark.timeout(900)


class Trained(NamedTuple):
    """What training leaves.

    Attributes:
        losses: of each step.
        grads: with which each step was taken: clipped, by the names of parameters.
        params: after the last step.
    """

    losses: list[float]
    grads: list[dict[str, Tensor]]
    params: dict[str, Tensor]


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def trained_in_a_pipeline(rank: int, group: dist.ProcessGroup, arguments: list[str]) -> Trained:
    """Train on this rank; gradients and parameters are those of its stages, whole."""
    options = example.parse_options(arguments)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "data"))
    model = example.load_model(options).double()
    pipeline = example.make_pipeline(options, mesh, torch.device("cpu"), model)
    found = Trained([], [], {})
    for batch in example.batches(options, mesh.get_local_rank("data"), 2):
        found.grads.append({})
        hooks = [
            optimizer.register_step_pre_hook(lambda *_, s=stage: found.grads[-1].update(whole_grads(s.part)))
            for optimizer, stage in zip(pipeline.optimizers, pipeline.stages.values(), strict=True)
        ]
        found.losses.append(example.train_step(pipeline, batch))
        for hook in hooks:
            hook.remove()
    for stage in pipeline.stages.values():
        for name, parameter in stage.part.named_parameters():
            found.params[name] = parameter.detach().full_tensor()
    return found


def whole_grads(part: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.full_tensor() for name, parameter in part.named_parameters()}


def trained_whole(arguments: list[str]) -> Trained:
    """Train in this process, on the batches of both data ranks at once, with the model's own loss."""
    options = example.parse_options(arguments)
    model = example.load_model(options).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=example.LEARNING_RATE)
    found = Trained([], [], {})
    norms = []
    for batch in example.batches(options, 0, 1):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), example.MAX_NORM).item())
        found.losses.append(loss.item())
        found.grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
    assert max(norms) > example.MAX_NORM  # else clipping was not tested
    found.params.update({name: p.detach() for name, p in model.named_parameters()})
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], **close: float) -> None:
    """Compare what a rank has with the whole model's, in which a tied head is the embedding."""
    for name, tensor in found.items():
        own = name if name in expected else "model.embed_tokens.weight"
        torch.testing.assert_close(tensor, expected[own], **close)


def once(options: list[str]) -> list[str]:
    """Let one process make the batches of two data ranks."""
    return [*options, f"--microbatches={2 * example.parse_options(options).microbatches}"]


@pytest.mark.parametrize("engine", ["none", "aten"])
@pytest.mark.parametrize("embedding", ["tied", "untied"])
@pytest.mark.parametrize(
    ("schedule", "rows"), [("Interleaved1F1B", "full"), ("ZBVZeroBubble", "padded"), ("1F1B", "padded")]
)
def test_losses_gradients_and_parameters_are_those_of_the_whole_model(
    schedule: str, rows: str, embedding: str, engine: str
) -> None:
    options = [*SMALL, f"--schedule={schedule}", f"--compile={engine}"]
    options += ["--tied"] * (embedding == "tied") + ["--padded"] * (rows == "padded")
    expected = trained_whole(once(options))
    ranks = run(4, trained_in_a_pipeline, options)
    for found in ranks:
        assert found.losses == pytest.approx(expected.losses, rel=1e-6)
        for mine, theirs in zip(found.grads, expected.grads, strict=True):
            assert_close(mine, theirs, **CLOSE)
        assert_close(found.params, expected.params, **STEPPED)
    assert {name for found in ranks for name in found.params} >= expected.params.keys()


SMALLEST = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 4},
    "Qwen3": {"head_dim": 8, "sliding_window": 4, "use_sliding_window": True, "max_window_layers": 2},
    "Gemma2": {"head_dim": 8, "sliding_window": 4},
    "Gemma3Text": {"head_dim": 8, "sliding_window": 4},
    "Phi3": {},
    "Mixtral": {"num_local_experts": 4, "experts_implementation": "batched_mm"},
    "GPTNeoX": {},
    "Cohere": {},
    "GptOss": {"num_local_experts": 4, "head_dim": 8, "sliding_window": 4},
}


def build(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALLEST, **options})
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", MODELS)
def test_models_that_say_where_they_can_be_cut_compute_the_same_in_stages(name: str) -> None:
    model = build(name, **MODELS[name])
    stages = example.cut_causal_lm(model, 3)
    x: Any = torch.randint(3, 40, (2, 8))
    positions = torch.arange(8).expand(2, -1) + 3
    expected = model(x, position_ids=positions).logits
    for stage in stages:
        x = stage(x, position_ids=positions)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5)


def test_full_rows_need_no_masks_under_an_attention_that_is_told_of_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transformers.AttentionInterface.register("causal", sdpa_attention_forward)
    tokens, masks = torch.randint(3, 40, (2, 8)), []
    expected = build("Llama")(tokens).logits
    attend = functional.scaled_dot_product_attention
    monkeypatch.setattr(
        functional,
        "scaled_dot_product_attention",
        lambda *args, attn_mask, **more: (
            masks.append(attn_mask) or attend(*args, attn_mask=attn_mask, **more)
        ),
    )
    x: Any = tokens
    for stage in example.cut_causal_lm(build("Llama", attn_implementation="causal"), 3):
        apply, params, buffers = fs.functionalize(stage)
        x, _, _ = fs.stage_vjp(fs.compile(apply, backend="aten", fullgraph=True), params, buffers, x)
    torch.testing.assert_close(x, expected)
    assert set(masks) == {None}


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("GPT2", {}, "no base_model_pp_plan"),
        ("Granite", {"embedding_multiplier": 3.0}, "compute something else"),
        ("Mixtral", {"output_router_logits": True}, "output_router_logits=False"),
        ("Llama", {"num_hidden_layers": 2}, "too few for 3 stages"),
    ],
)
def test_models_that_would_be_cut_wrongly_are_refused(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        example.cut_causal_lm(build(name, **options), 3)


def torchrun(folder: Path, *options: str) -> list[float]:
    """Run the script; the losses it prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(SCRIPT), f"--checkpoint={folder}", *options],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step")]


def test_the_script_goes_on_over_other_stages_and_the_whole_model_reads_its_checkpoint(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "pretrained"
    save_tokenizer(folder)
    build("Llama", num_hidden_layers=4, tie_word_embeddings=True, vocab_size=256).save_pretrained(folder)
    options = [f"--model={folder}", "--context=16"]
    expected = trained_whole([*options, "--steps=5", "--microbatches=8"]).losses

    checkpoints = tmp_path / "checkpoints"
    losses = torchrun(checkpoints, *options, "--compile=aten", "--steps=2")
    others = ["--pipeline=4", "--schedule=1F1B", "--microbatches=8", "--compile=none"]
    losses += torchrun(checkpoints, *options, "--steps=4", *others)
    assert losses == pytest.approx(expected[:4], abs=2e-4)

    trained = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    dcp.load({"model": trained.state_dict()}, checkpoint_id=checkpoints / "step-4")
    trained.save_pretrained(tmp_path / "trained")
    trained = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "trained", dtype=torch.float32)
    *_, last = example.batches(example.parse_options([*options, "--steps=5", "--microbatches=8"]), 0, 1)
    assert trained(**last).loss.item() == pytest.approx(expected[4], abs=2e-4)


def save_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens are bytes."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, [])
    tokenizer = tokenizers.Tokenizer(tokens)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def trained_beside_accelerate(rank: int, group: dist.ProcessGroup, arguments: list[str]) -> list[float]:
    """As docs/transformers.md has it: accelerate's optimizers and loaders, torch's schedule."""
    from accelerate import Accelerator
    from accelerate.data_loader import prepare_data_loader
    from accelerate.state import AcceleratorState

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": dist.get_world_size()}.items():
            patch.setenv(name, str(value))
        patch.setenv("MASTER_ADDR", "localhost")  # of a group that is there already
        patch.setenv("MASTER_PORT", "0")
        accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 4
    options = example.parse_options(arguments)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "data"))
    model = example.load_model(options).double()
    pipeline = example.make_pipeline(options, mesh, accelerator.device, model)
    pipeline = pipeline._replace(optimizers=[accelerator.prepare(each) for each in pipeline.optimizers])
    rows = [row for batch in example.batches(options, 0, 1) for row in rows_of(batch)]
    loader = prepare_data_loader(
        torch.utils.data.DataLoader(rows, batch_size=len(rows) // options.steps // 2),
        device=accelerator.device,
        num_processes=mesh["data"].size(),
        process_index=mesh.get_local_rank("data"),
        put_on_device=True,
    )
    losses = [example.train_step(pipeline, batch) for batch in loader]
    AcceleratorState._reset_state(reset_partial_state=True)
    return losses


def rows_of(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]


def test_accelerates_optimizers_and_loaders_serve_the_pipeline() -> None:
    pytest.importorskip("accelerate", reason="needs the extra: pip install -e '.[models]'")
    options = [*SMALL, "--padded", "--compile=none", "--microbatches=4"]
    expected = trained_whole(options).losses
    for losses in run(4, trained_beside_accelerate, options):
        assert losses == pytest.approx(expected, rel=1e-6)
