"""The command line as a user meets it, and the demo's own optimizer and text."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import funcstage as fs
from funcstage.__main__ import main
from funcstage.demo import adamw, model, run, text

pytestmark = pytest.mark.slow


def command_line(*arguments: Any, folder: Path, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [sys.executable, *(torchrun if ranks > 1 else []), "-m", "funcstage", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(fs.__file__).parents[1]), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_demo_trains_checks_and_reports(tmp_path: Path) -> None:
    done = command_line("demo", "--steps", 6, "--microbatches", 4, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "all gradients equal those of plain eager backward" in " ".join(done.stdout.split())
    assert "step 6/6" in done.stdout
    assert re.search(r"ZBVZeroBubble [\d.]+% of \d+ ms, 1F1B on the same 2 ranks", done.stdout)
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"train loss .* validation loss .* unigram entropy .* per byte", last)
    losses = [float(loss) for loss in re.findall(r"step \d+/6 +loss ([\d.]+)", done.stdout)]
    assert losses[-1] < losses[0]
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


def read_scalars(folder: Path) -> dict[str, list[int]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {name: [event.step for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_demo_writes_scalars_for_tensorboard_where_it_is_installed(tmp_path: Path, ranks: int) -> None:
    pytest.importorskip("tensorboard")
    options = ["--steps", 2, "--microbatches", 4, "--scalars", "runs"]
    done = command_line("demo", *options, folder=tmp_path, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert "tensorboard --logdir runs" in done.stdout
    folder = tmp_path / "runs"
    read = [read_scalars(folder / f"rank{r}" if ranks > 1 else folder) for r in range(ranks)]
    assert {name for each in read for name in each} == {
        "loss",
        "seconds",
        "bubble",
        "residual_bytes",
        *(f"{kind}_seconds/stage_{s}" for kind in "FIW" for s in range(4)),
        *(f"residual_bytes/stage_{s}" for s in range(4)),
    }
    assert all(steps == [0, 1, 2] for each in read for steps in each.values())  # 0 is the check


@pytest.mark.parametrize(("schedule", "stages"), [("1F1B", 3), ("Interleaved1F1B", 4), ("DualPipeV", 2)])
def test_the_demo_runs_under_other_schedules_and_cuts(schedule: str, stages: int, tmp_path: Path) -> None:
    options = ["--schedule", schedule, "--stages", stages, "--steps", 1, "--microbatches", 4, "--seed", 3]
    done = command_line("demo", *options, "-o", tmp_path / "picture.svg", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "unigram entropy" in done.stdout.splitlines()[-1]
    assert "<svg" in (tmp_path / "picture.svg").read_text()


def test_under_torchrun_the_ranks_are_processes_and_the_first_one_reports(tmp_path: Path) -> None:
    options = ["--steps", 2, "--microbatches", 4]
    spread, alone = (command_line("demo", *options, folder=tmp_path, ranks=n) for n in (2, 1))
    assert spread.returncode == 0, spread.stderr
    assert "2 ranks, a process each" in spread.stdout
    assert spread.stdout.count("all gradients equal those of plain eager backward") == 1
    assert (tmp_path / "timeline.png").exists()
    assert spread.stdout.splitlines()[-1] == alone.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--stages", 3], "multiple of 2; got 3 stages"),
        (["--device", "nowhere"], "--device nowhere cannot be used here"),
        (["-o", "no/such/folder.png"], "there is no folder"),
        (["--steps", 0], "must be 1 or more"),
        (["--schedule", "ZB-H1"], "invalid choice"),
    ],
)
def test_bad_options_are_refused_in_one_line_and_nothing_is_written(
    arguments: list[Any],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status: object = main(["demo", *map(str, arguments)])
    except SystemExit as left:  # argparse's own way
        status = left.code
    assert status in (1, 2)
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_interrupted_demo_says_so_and_returns_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(settings: run.Settings) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", interrupted)
    assert main(["demo"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_help_names_the_commands_and_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "demo" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    said = capsys.readouterr().out
    for option in ("--device", "--schedule", "--steps", "--stages", "--microbatches", "--seed", "--output"):
        assert option in said
    assert "ZBVZeroBubble" in said


def test_adamw_takes_the_steps_of_torchs() -> None:
    torch.manual_seed(0)
    params = [{"weight": torch.randn(3, 2, dtype=torch.float64), "unused": torch.ones(2, 2)}]
    reference = params[0]["weight"].clone().requires_grad_()
    theirs = torch.optim.AdamW([reference], lr=0.1, betas=(0.9, 0.95), weight_decay=0.2)
    optimizer = adamw.adamw(lambda step: 0.1, betas=(0.9, 0.95), weight_decay=0.2)
    state = optimizer.init(params)
    for _ in range(5):
        reference.grad = torch.randn(3, 2, dtype=torch.float64)
        given = params[0]["weight"].clone()
        before = params
        params, state = optimizer.update([{"weight": reference.grad, "unused": None}], state, params)
        theirs.step()
        assert torch.equal(before[0]["weight"], given)
    torch.testing.assert_close(params[0]["weight"], reference.detach())
    assert torch.equal(params[0]["unused"], torch.ones(2, 2))


def test_the_text_is_the_same_for_the_same_seed_and_its_tail_is_held_out(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"{i:02}.py").write_text(f"value_{i} = {i}\n" * 500)
    first, again, other = (text.standard_library(seed, tmp_path) for seed in (0, 0, 1))
    assert torch.equal(first.train, again.train)
    assert not torch.equal(first.train, other.train)
    assert first.files == 30
    assert 0 < len(first.held_out) < len(first.train)


def test_the_unigram_entropy_of_evenly_used_bytes_is_the_log_of_their_number() -> None:
    corpus = text.Text(torch.arange(6, dtype=torch.uint8), torch.arange(6, 8, dtype=torch.uint8), 1)
    assert corpus.unigram_entropy == pytest.approx(math.log(8))
    assert text.bits(corpus.unigram_entropy) == pytest.approx(3)


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(fs.StageError, match="has only 0 bytes"):
        text.standard_library(0, tmp_path)


def test_targets_are_the_inputs_one_byte_on() -> None:
    corpus = torch.arange(100, dtype=torch.uint8)
    x, y = next(text.random_batches(corpus, 5, 7, seed=0))
    assert x.shape == y.shape == (5, 7)
    assert torch.equal(x + 1, y)
    x, y = text.windows(corpus, 4, 10)
    assert torch.equal(x + 1, y)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 6])
def test_the_model_is_causal_and_the_same_however_it_is_cut(num_stages: int) -> None:
    torch.manual_seed(0)
    whole = model.build_model(num_stages)
    stages = model.cut_evenly(whole, num_stages)
    assert len(stages) == num_stages
    x = torch.randint(256, (1, 12))
    changed = x.clone()
    changed[:, 8:] = 0
    torch.testing.assert_close(whole(x)[:, :8], whole(changed)[:, :8])
    assert torch.equal(torch.nn.Sequential(*stages)(x), whole(x))
