"""Checkpoints of `examples/train_distributed.py` that are damaged are noticed, and the one before is used."""

from __future__ import annotations

import json
import runpy
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from one_process import one_process
from torch import nn

SCRIPT = Path(__file__).parents[2] / "examples" / "train_distributed.py"


@pytest.fixture(autouse=True, scope="module")
def alone() -> Iterator[None]:
    """A process group of this process alone."""
    with one_process():
        yield


@pytest.fixture
def example() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


class Run:
    """A training run of one layer, whose weights tell the step."""

    def __init__(self, example: dict[str, Any], folder: Path) -> None:
        self.example, self.folder = example, folder
        self.mine = nn.ModuleDict({"0": nn.Linear(2, 2)})
        self.optimizer = torch.optim.AdamW(self.mine.parameters())

    def save(self, step: int) -> None:
        for parameter in self.mine.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        with torch.no_grad():
            for parameter in self.mine.parameters():
                parameter.fill_(step)
        self.example["save"](self.folder, self.mine, self.optimizer, [0.5] * step)

    def load(self) -> int:
        """Load what there is, and return its step."""
        losses = self.example["load"](self.folder, self.mine, self.optimizer)
        step = len(losses)
        if step:
            assert {p.unique().item() for p in self.mine.parameters()} == {step}
        return step


@pytest.fixture
def saved(example: dict[str, Any], tmp_path: Path) -> Path:
    """A folder with checkpoints of three steps, of which two are kept."""
    run = Run(example, tmp_path)
    for step in (2, 4, 6):
        run.save(step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-4", "step-6"]
    return tmp_path


def data(checkpoint: Path) -> Path:
    (file,) = checkpoint.glob("*.distcp")
    return file


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # one bit, in the middle of the weights
    file.write_bytes(content)


def lengthened(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def missing(file: Path) -> None:
    file.unlink()


DAMAGES = [truncated, emptied, flipped, lengthened, missing]
Damage = Callable[[Path], None]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", ["*.distcp", ".metadata", "checksums.json"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(
    damage: Damage, name: str, saved: Path, example: dict[str, Any], capsys: Any
) -> None:
    (file,) = (saved / "step-6").glob(name)
    damage(file)
    assert Run(example, saved).load() == 4
    assert f"{saved / 'step-6'} is damaged" in capsys.readouterr().out


def test_the_latest_is_used_where_nothing_is_damaged(saved: Path, example: dict[str, Any]) -> None:
    assert Run(example, saved).load() == 6


def removed(pointer: Path) -> None:
    pointer.unlink()


def garbage(pointer: Path) -> None:
    pointer.write_bytes(b"\xff\x00st")


def half_a_name(pointer: Path) -> None:
    pointer.write_text("step-")


def endless_digits(pointer: Path) -> None:
    pointer.write_text("step-" + "9" * 5000)


def of_an_unknown_checkpoint(pointer: Path) -> None:
    pointer.write_text("step-9")


@pytest.mark.parametrize(
    "damage",
    [removed, emptied, garbage, half_a_name, endless_digits, of_an_unknown_checkpoint],
    ids=lambda d: d.__name__,
)
def test_a_damaged_pointer_loses_no_checkpoint(damage: Damage, saved: Path, example: dict[str, Any]) -> None:
    damage(saved / "latest")
    assert Run(example, saved).load() == 6


def test_a_checkpoint_that_was_never_announced_is_not_used(saved: Path, example: dict[str, Any]) -> None:
    (saved / "latest").write_text("step-4")
    assert Run(example, saved).load() == 4
    (saved / "latest").write_text("step-4\n")  # by `echo step-4 > latest`
    assert Run(example, saved).load() == 4


def test_checksums_that_leave_files_out_are_damaged(saved: Path, example: dict[str, Any]) -> None:
    sums = saved / "step-6" / "checksums.json"
    whole = json.loads(sums.read_text())
    flipped(data(saved / "step-6"))
    for left in ("{}", json.dumps({".metadata": whole[".metadata"]}), "[" * 100_000):
        sums.write_text(left)
        (saved / "latest").write_text("step-6")
        assert Run(example, saved).load() == 4


def test_where_no_checkpoint_is_whole_nothing_is_trained(saved: Path, example: dict[str, Any]) -> None:
    for name in ("step-4", "step-6"):
        flipped(data(saved / name))
    with pytest.raises(ValueError, match=r"No checkpoint in .* is whole"):
        Run(example, saved).load()


def test_what_a_save_left_that_was_cut_short_at_the_very_first_is_no_checkpoint(
    example: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "step-2").mkdir()
    (tmp_path / "step-2" / "__0_0.distcp").write_bytes(b"half of a chec")
    assert Run(example, tmp_path).load() == 0
    run = Run(example, tmp_path)
    run.save(2)
    assert run.load() == 2


class PowerFailure(Exception):
    """In the midst of a save."""


@pytest.mark.parametrize("after", ["nothing", "the data", "the checksums"])
def test_a_save_that_is_cut_short_leaves_the_one_before_in_force(
    after: str, saved: Path, example: dict[str, Any], monkeypatch: Any
) -> None:
    scope = example["save"].__globals__
    write, dcp = scope["write"], scope["dcp"]

    def fails_to_save(state: Any, checkpoint_id: Path) -> None:
        if after != "nothing":
            dcp.save(state, checkpoint_id=checkpoint_id)
            return
        checkpoint_id.mkdir()
        (checkpoint_id / "__0_0.distcp").write_bytes(b"half of a chec")
        raise PowerFailure

    def fails_to_write(file: Path, content: str) -> None:
        if after == "the checksums" and file.name == "checksums.json":
            write(file, content)
        else:
            raise PowerFailure

    monkeypatch.setitem(scope, "dcp", types.SimpleNamespace(save=fails_to_save, load=dcp.load))
    monkeypatch.setitem(scope, "write", fails_to_write)
    with pytest.raises(PowerFailure):
        Run(example, saved).save(8)
    assert (saved / "latest").read_text() == "step-6"
    assert sorted(path.name for path in saved.iterdir()) == ["latest", "step-4", "step-6", "step-8"]
    assert Run(example, saved).load() == 6
    monkeypatch.undo()
    run = Run(example, saved)
    run.save(8)  # over what was left behind
    assert run.load() == 8
    assert sorted(path.name for path in saved.iterdir()) == ["latest", "step-6", "step-8"]


def test_a_run_that_went_back_goes_on_over_the_damaged_checkpoint(
    saved: Path, example: dict[str, Any]
) -> None:
    flipped(data(saved / "step-6"))
    run = Run(example, saved)
    assert run.load() == 4
    run.save(6)
    assert Run(example, saved).load() == 6
    flipped(data(saved / "step-6"))
    assert Run(example, saved).load() == 4  # which was kept, as the one before
    run.save(9)
    assert sorted(path.name for path in saved.iterdir()) == ["latest", "step-4", "step-9"]


def test_files_are_replaced_whole(example: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "latest"
    example["write"](file, "step-2")
    linked = tmp_path / "seen by a reader"
    linked.hardlink_to(file)
    example["write"](file, "step-4")
    assert (file.read_text(), linked.read_text()) == ("step-4", "step-2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "seen by a reader"]
