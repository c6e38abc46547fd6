"""`examples/train_distributed.py` learns what one process would, and survives the death of any rank.

Ranks are killed with SIGKILL while a step is under way: the script writes its losses after every step,
and the signal goes out as soon as a given number of them is there.
"""

from __future__ import annotations

import itertools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from funcstage.demo import model, text

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "train_distributed.py"
STEPS, MICROBATCHES = 7, 4
SECONDS = 240  # that anything may take on a busy machine

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]


def options(folder: Path, **more: Any) -> list[str]:
    given = {"steps": STEPS, "microbatches": MICROBATCHES, "losses": folder / "losses.json", **more}
    return [str(SCRIPT), *(f"--{name}={value}" for name, value in given.items())]


def torchrun(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments]


@contextmanager
def running(command: list[str], folder: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command, its output in `output.txt`; it and its ranks are killed at the end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    with (folder / "output.txt").open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        yield process
    finally:
        children = workers(process.pid).values()
        for pid in (process.pid, *children):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def workers(torchrun: int) -> dict[int, int]:
    """Find the processes that torchrun has started, by rank."""
    found = {}
    with suppress(FileNotFoundError, ProcessLookupError):  # one has just ended
        for pid in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split():
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found |= {int(v.partition(b"=")[2]): int(pid) for v in variables if v.startswith(b"RANK=")}
    return found


def wait_for(look: Callable[[], object], process: subprocess.Popen[bytes], folder: Path) -> None:
    """Look until there is something to see, while the process runs."""
    deadline = time.monotonic() + SECONDS
    while not look():
        said = output(folder)
        assert process.poll() is None, said
        assert time.monotonic() < deadline, said
        time.sleep(0.005)


def losses(folder: Path) -> list[float]:
    file = folder / "losses.json"
    return json.loads(file.read_text()) if file.exists() else []


def output(folder: Path) -> str:
    return (folder / "output.txt").read_text()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with running(torchrun(*options(folder)), folder) as process:
        assert process.wait(SECONDS) == 0, output(folder)
    return losses(folder)


def test_the_pipeline_has_the_loss_curve_of_the_whole_model_in_one_process(undisturbed: list[float]) -> None:
    constants = runpy.run_path(str(SCRIPT))
    torch.manual_seed(0)
    whole = torch.nn.Sequential(*model.build_stages(4))
    optimizer = torch.optim.AdamW(whole.parameters(), lr=constants["LEARNING_RATE"])
    batch = MICROBATCHES * constants["SEQUENCES_PER_MICROBATCH"]
    batches = text.random_batches(text.standard_library(0).train, batch, model.CONTEXT, 0)
    expected = []
    for inputs, targets in itertools.islice(batches, STEPS):
        loss = model.loss_fn(whole(inputs), targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), constants["MAX_NORM"])
        expected.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert norm > constants["MAX_NORM"]  # else clipping was not tested
    assert undisturbed == pytest.approx(expected, rel=1e-5)


def test_where_steps_cannot_be_captured_it_says_so_and_runs_the_same(
    undisturbed: list[float], tmp_path: Path
) -> None:
    with running(torchrun(*options(tmp_path), "--captured"), tmp_path) as process:
        assert process.wait(SECONDS) == 0, output(tmp_path)
    assert "ScheduleZBVZeroBubble runs as it is, not as a CUDA graph: stages on cpu" in output(tmp_path)
    assert losses(tmp_path) == undisturbed


def test_a_run_whose_ranks_are_killed_ends_like_one_that_nothing_happened_to(
    undisturbed: list[float], tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    (saved / "step-2").mkdir(parents=True)  # what a save that was cut short leaves behind
    (saved / "step-2" / "__0_0.distcp").write_bytes(b"half of a chec")
    command = torchrun("--max-restarts=2", *options(tmp_path, checkpoint=saved, every=2))
    with running(command, tmp_path) as process:
        for rank, after, checkpoint in ((0, 3, "step-2"), (1, 5, "step-4")):
            wait_for(lambda after=after: len(losses(tmp_path)) >= after, process, tmp_path)
            os.kill(workers(process.pid)[rank], signal.SIGKILL)
            resumed = f"going on from {saved / checkpoint}"
            wait_for(lambda resumed=resumed: resumed in output(tmp_path), process, tmp_path)
        assert process.wait(SECONDS) == 0, output(tmp_path)
    assert losses(tmp_path) == undisturbed
    assert sorted(path.name for path in saved.iterdir()) == ["latest", f"step-{STEPS - 1}", f"step-{STEPS}"]


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    undisturbed: list[float], tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    for steps, damaged in ((4, True), (STEPS, False)):
        with running(torchrun(*options(tmp_path, checkpoint=saved, every=2, steps=steps)), tmp_path) as run:
            assert run.wait(SECONDS) == 0, output(tmp_path)
        if damaged:
            shard = saved / "step-4" / "__1_0.distcp"
            shard.write_bytes(shard.read_bytes()[:-100])
    assert f"{saved / 'step-4'} is damaged: __1_0.distcp" in output(tmp_path)
    assert f"going on from {saved / 'step-2'}" in output(tmp_path)
    assert losses(tmp_path) == undisturbed


def test_without_restarts_the_whole_job_fails(tmp_path: Path) -> None:
    with running(torchrun("--max-restarts=0", *options(tmp_path, steps=10**6)), tmp_path) as process:
        wait_for(lambda: losses(tmp_path), process, tmp_path)
        os.kill(workers(process.pid)[1], signal.SIGKILL)
        assert process.wait(SECONDS) != 0


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_whose_peer_dies_fails_by_itself_and_soon(killed: int, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, *options(tmp_path, steps=10**6, timeout=600)]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    with (
        running(command, tmp_path, RANK="0", LOCAL_RANK="0", **group) as first,
        running(command, tmp_path, RANK="1", LOCAL_RANK="1", **group) as second,
    ):
        wait_for(lambda: losses(tmp_path), first, tmp_path)
        victim, survivor = (first, second) if killed == 0 else (second, first)
        victim.kill()
        assert survivor.wait(30) == 1
    assert "Traceback" in output(tmp_path)
