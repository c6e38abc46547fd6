"""plan, check and timeline as a user meets them, on a terminal and not."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import funcstage as fs
from funcstage.__main__ import main
from funcstage.cli import show
from funcstage.pipelining import Costs, pipeline_order, read_order, simulate


def block() -> tuple[Any, ...]:
    return nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 6)).double(), torch.ones(3, 6).double()


def functional() -> tuple[Any, ...]:
    module, x = block()
    return fs.functionalize(module), x


def on_meta() -> tuple[Any, ...]:
    with torch.device("meta"):
        return nn.Linear(1 << 16, 1 << 16), torch.empty(8, 1 << 16)


class ReadsValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) if x.sum() > 0 else x


def reads_values() -> tuple[Any, ...]:
    return ReadsValues(), torch.ones(2, 4)


class _Skewed(torch.autograd.Function):
    """Another gradient each time that it is run, as no function has."""

    runs = 0

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        _Skewed.runs += 1
        return grad * 2 * _Skewed.runs


class Skewed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Skewed.apply(self.linear(x))


def skewed() -> tuple[Any, ...]:
    return Skewed(), torch.ones(2, 4)


def nothing() -> int:
    return 3


def raising() -> tuple[Any, ...]:
    raise ValueError("there is no data\n\nand no more to say")


def of_a_tuple() -> tuple[Any, ...]:
    return nn.Linear(3, 2), (torch.ones(4, 3),)


def of_a_wrong_shape() -> tuple[Any, ...]:
    return nn.Linear(3, 2), torch.ones(2, 5)


def half_on_meta() -> tuple[Any, ...]:
    return nn.Linear(3, 2, device="meta"), torch.ones(2, 3)


def printed(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("factory", ["block", "functional"])
def test_the_plan_is_that_of_the_compiled_stage(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = printed(capsys, "plan", f"test_commands:{factory}", "--json")
    module, x = block()
    apply, params, buffers = fs.functionalize(module)
    plan = fs.compile(apply, backend="aten").plan(params, buffers, x)
    found = json.loads(out)
    assert status == 0
    assert found["forward"] == plan.forward._asdict()
    assert found["weight_grad"]["flops"] == plan.weight_grad.flops == 2 * 2 * 3 * 6 * 5
    assert found["held_after_forward"] == plan.held_after_forward


def test_a_stage_larger_than_the_machine_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = printed(capsys, "plan", "test_commands:on_meta")
    assert status == 0
    rows = [line.split()[:3] for line in out.splitlines()[2:5]]
    assert rows == [[name, "68.7", "GFLOP"] for name in "FIW"]  # 2 * 8 * 2**32


def test_what_backward_computes_again_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    flops = {}
    for remat in ("none", "full"):
        _, out, _ = printed(capsys, "plan", "test_commands:block", "--remat", remat, "--json")
        flops[remat] = json.loads(out)["input_grad"]["recomputed_flops"]
    assert flops["full"] > flops["none"] == 0


def test_a_right_split_is_equal_by_each_engine(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["check", "test_commands:block", "--engine", "closures", "--engine", "aten"]
    status, out, _ = printed(capsys, *command, "--json")
    found = json.loads(out)
    assert (status, found["equal"]) == (0, True)
    assert {name: engine["exact"] for name, engine in found["engines"].items()} == {"closures": 6, "aten": 6}
    status, out, _ = printed(capsys, *command)
    assert status == 0
    assert [line.split()[:2] for line in out.splitlines()[2:]] == [["closures", "equal"], ["aten", "equal"]]


def test_an_engine_that_refuses_is_named_beside_one_that_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    engines = ["--engine", "aten", "--engine", "closures"]
    status, out, _ = printed(capsys, "check", "test_commands:reads_values", *engines)
    assert status == 0
    assert "aten: ReadsValues cannot be traced" in out
    status, out, err = printed(capsys, "check", "test_commands:reads_values", "--engine", "aten")
    assert (status, out) == (1, "")
    assert err.startswith("funcstage: ReadsValues cannot be traced")


def test_a_wrong_split_is_told_by_leaf_and_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = printed(capsys, "check", "test_commands:skewed", "--engine", "closures")
    assert status == 1
    assert "differs" in out.splitlines()[2]
    assert "closures: gradient of params['linear.weight']: max abs error" in out


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("test_commands:nothing", "returned int"),
        ("test_commands:absent", "has no function 'absent'"),
        ("test_commands", "test_commands has no factory after a colon"),
        ("test_commands:", "has no factory after a colon"),
        ("no_such_module:block", "no_such_module cannot be imported"),
        (":block", "cannot be imported"),
    ],
)
def test_what_is_no_factory_is_refused_with_what_one_is(
    name: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("plan", "check"):
        status, out, err = printed(capsys, command, name)
        assert (status, out) == (1, "")
        assert says in err
        assert "It must be package.module:factory" in err


@pytest.mark.parametrize("command", ["check", "plan"])
@pytest.mark.parametrize(
    ("factory", "says"),
    [
        ("raising", "raised ValueError at .*test_commands.py:[0-9]+: there is no data. --traceback"),
        ("of_a_wrong_shape", r"float32\[2, 5\] on cpu raised RuntimeError: (addmm: )?mat1 and mat2"),
        ("half_on_meta", "Put the module and its arguments on the same device"),
        ("of_a_tuple", r"A factory returns \(module, x\), where the call is module\(x\)"),
    ],
)
def test_an_error_of_the_stages_own_is_one_line_unless_the_traceback_is_wanted(
    command: str, factory: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = printed(capsys, command, f"test_commands:{factory}")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert re.search(says, err)
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        main([command, f"test_commands:{factory}", "--traceback"])


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"funcstage {fs.__version__}, torch {torch.__version__}\n"


def test_what_two_stages_of_a_rank_hold_is_halved_exactly(capsys: pytest.CaptureFixture[str]) -> None:
    schedule = ["timeline", "--schedule", "InterleavedZeroBubble", "--held", 2, 1]
    _, out, _ = printed(capsys, *schedule, "--json")
    assert json.loads(out)["peak_memory"] == [8, 7.5, 7, 6.5]
    _, out, _ = printed(capsys, *schedule)
    assert [line.split()[-2:] for line in out.splitlines()[2:]] == [
        [n, "B"] for n in ("8", "7.5", "7", "6.5")
    ]


@pytest.mark.parametrize("costs", [(1, 1, 1), (1, 1.3, 0.7), (2, 1, 3)])
def test_no_built_in_schedule_is_faster_than_what_is_found_over_all_layouts(
    costs: tuple[float, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    size = ["--ranks", 2, "--microbatches", 6, "--comm", 0.25, "--costs", *costs]
    _, out, _ = printed(capsys, "timeline", "--schedule", "found", *size, "--json")
    found = json.loads(out)
    assert found["schedule"].startswith("found (based on ")
    for schedule in ("GPipe", "1F1B", "ZB-H1", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble"):
        status, out, _ = printed(capsys, "timeline", "--schedule", schedule, *size, "--json")
        assert status == 0
        assert found["seconds"] <= json.loads(out)["seconds"] + 1e-9, schedule


def test_a_search_says_what_it_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    search = ["timeline", "--schedule", "found", "--ranks", 2, "--microbatches", 2]
    assert "note:" not in printed(capsys, *search)[1]
    assert "note: only orders with one stage a rank" in printed(capsys, *search, "--stages-per-rank", 1)[1]
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert "note: scipy is not installed" in printed(capsys, *search)[1]


@pytest.mark.parametrize(
    "command",
    [
        ["plan", "test_commands:on_meta"],
        ["check", "test_commands:block", "--engine", "closures", "--engine", "aten"],
        ["timeline", "--ranks", 2],
    ],
)
def test_a_table_fits_into_80_columns_on_a_terminal_and_off(
    command: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, plain, _ = printed(capsys, *command)
    assert max(map(len, plain.splitlines())) <= 80
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(show, "is_rich", lambda: True)
    _, drawn, _ = printed(capsys, *command)
    assert max(map(len, drawn.splitlines())) <= 80
    assert "…" not in drawn
    figures = re.findall(r"[0-9][0-9.,]* ?(?:[kMGT]?FLOP|[KMG]?i?B|s)\b", plain)
    assert figures
    assert [figure for figure in figures if figure not in drawn] == []


@pytest.mark.parametrize("columns", [200, 84, 83, 80, 79, 74, 73, 40])
def test_no_figure_is_cut_however_narrow_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    header = ("engine", "verdict", "bitwise", "FLOP: F + I + W", "eager", "before I", "before W")
    rows = [
        ("closures", "equal", "6 of 6", "2.1 M + 2.1 M + 2.1 M", "6.29 M", "72 KiB", "80 KiB"),
        ("inductor", "equal", "0 of 6", "22.1 M + 2.1 M + 2.1 M", "6.29 M", "40 KiB", "80 KiB"),
    ]
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(show, "is_rich", lambda: True)
    show.table("Sequential", header, rows)
    drawn = capsys.readouterr().out
    assert max(map(len, drawn.splitlines())) <= columns
    assert [cell for row in rows for cell in row if drawn.count(cell) < sum(cell in r for r in rows)] == []
    assert all(word in drawn for name in header for word in name.split())
    assert ("┃" in drawn) == (columns >= 80)


@pytest.mark.parametrize("command", [[], ["plan"], ["check"], ["timeline"], ["demo"]], ids=" ".join)
def test_help_fits_into_80_columns(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_a_timeline_says_what_the_simulation_does(capsys: pytest.CaptureFixture[str]) -> None:
    costs = ["--costs", 1, 1.5, 0.5, "--held", 8, 4, "--comm", 0.25]
    schedule = ["--schedule", "ZBVZeroBubble", "--ranks", 3, "--microbatches", 6]
    status, out, _ = printed(capsys, "timeline", *schedule, *costs, "--json")
    found = json.loads(out)
    timeline = simulate(pipeline_order("ZBVZeroBubble", 6, 6), [Costs(0.5, 0.75, 0.25, 4, 2)] * 6, comm=0.25)
    assert status == 0
    assert (found["seconds"], found["bubble_fraction"]) == (timeline.makespan, timeline.bubble_fraction)
    assert found["peak_memory"] == timeline.peak_memory
    assert found["critical_path"][0] == "0F0"


def test_bytes_may_be_written_with_an_exponent(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["timeline", "--schedule", "GPipe", "--ranks", 2, "--microbatches", 2]
    _, out, _ = printed(capsys, *options, "--held", "2e9", "1e9", "--json")
    assert json.loads(out)["peak_memory"] == [4_000_000_000] * 2
    with pytest.raises(SystemExit):
        printed(capsys, *options, "--held", "much", 1)
    assert "--held: must be a number of bytes, such as 2e9, got 'much'" in capsys.readouterr().err


def test_a_found_schedule_is_written_for_torch_for_perfetto_and_for_the_eye(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / f"found{ending}" for ending in (".csv", ".json", ".svg")]
    options = ["--schedule", "found", "--ranks", 2, "--microbatches", 4, "--memory-limit", 4]
    outputs = [part for path in files for part in ("-o", path)]
    status, out, _ = printed(capsys, "timeline", *options, *outputs)
    assert status == 0
    assert out.count("written: ") == 3
    assert read_order(files[0]).num_microbatches == 4
    assert json.loads(files[1].read_text())["traceEvents"]
    assert "<svg" in files[2].read_text()
    _, out, _ = printed(capsys, "timeline", "--csv", files[0], "--json")
    assert max(json.loads(out)["peak_memory"]) <= 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--schedule", "1F1B", "--memory-limit", 4], "--memory-limit goes with --schedule found"),
        (["--schedule", "found", "--memory-limit", 1], "Raise memory_limit to 2 at least"),
        (["--csv", "absent.csv"], "--csv absent.csv cannot be read: No such file"),
        (["-o", "no/such/timeline.png"], "there is no folder no/such"),
        (["-o", "timeline.nothing"], "Format 'nothing' is not supported"),
        (["--ranks", 0], "--ranks must be 1 or more, got 0"),
        (["--ranks", -1], "--ranks must be 1 or more, got -1"),
        (["--microbatches", -3], "--microbatches must be 1 or more, got -3"),
        (["--comm", "nan"], "--comm must be finite and not negative, got nan"),
        (["--costs", 1, -1, 1], "--costs must be finite and not negative, got -1.0"),
        (["--held", -1, 0], "--held must be finite and not negative, got -1"),
    ],
)
def test_bad_options_of_a_timeline_are_refused_in_one_line(
    options: list[Any],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = printed(capsys, "timeline", *options)
    assert (status, out) == (1, "")
    assert says in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_terminal_gets_rich_tables_and_a_pipe_plain_text(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "funcstage", "timeline", "--ranks", "2"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(fs.__file__).parents[1]),
        "TERM": "xterm",
        "COLUMNS": "90",
    }
    plain = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert plain.returncode == 0
    assert plain.stdout.isascii()
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=theirs, stderr=theirs) as running:
        os.close(theirs)
        drawn = b""
        while part := _read(ours):
            drawn += part
    assert running.returncode == 0
    assert "┃" in drawn.decode()
    assert "ZBVZeroBubble" in drawn.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # how Linux says that the other side is closed
        return b""
