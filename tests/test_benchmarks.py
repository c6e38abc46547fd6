"""The benchmark script runs on a machine without a GPU, and what it reports makes sense."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def report_of(folder: Path, *options: str) -> dict:
    """Run `benchmarks.split`, which is no part of the installed package, and return its report."""
    file = folder / "out.json"
    command = [sys.executable, "-m", "benchmarks.split", "--device", "cpu", "--json", str(file), *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(file.read_text())


def test_every_system_is_measured_and_its_gradients_are_right(tmp_path):
    size = report_of(tmp_path, "--sizes", "XS", "--repeats", "2")["sizes"]["XS"]
    results = {result["system"]: result for result in size["results"]}
    split = {"torch split", "funcstage aten", "funcstage inductor"}
    assert results.keys() >= split | {"eager", "torch.compile"}
    for system, result in results.items():
        low, high = result["total_quartiles_ms"]
        least, most = result["total_range_ms"]
        assert 0 < least <= low <= result["total_ms"] <= high <= most < 1e5
        assert 0 < result["host_ms"] < 1e5
        assert 0 < result["first_result_s"] < 1e3
        assert 0 < result["relative_error"] < 2e-2
        for phase in ("forward_ms", "input_ms", "weight_ms"):
            assert result[phase] is None or 0 < result[phase] < 1e5
            assert result[phase] is not None or system not in split
        assert result["peak_mib"] is None, "there is nothing to see on a CPU"
        assert result["reserved_mib"] is None
    assert results["torch.compile"]["held_after_forward_mib"] is None
    assert results["funcstage inductor"]["held_after_forward_mib"] > 0

    ratios = size["ratios"]
    ours, theirs = results["funcstage inductor"], results["torch.compile"]
    assert ratios["inductor / torch.compile"] == ours["total_ms"] / theirs["total_ms"]
    assert ratios["time to first result / torch.compile"] > 0
    # So small a stage leaves its norms' sums to W.
    assert ratios["held for W / matrix products' operands"] == pytest.approx(1, abs=0.1)


def test_a_stage_is_traced_and_partitioned_without_its_weights(tmp_path):
    meta = report_of(tmp_path, "--sizes", "", "--meta", "1")["meta"]
    assert min(meta["trace_s"], meta["separate_s"], meta["partition_s"]) > 0
    assert meta["rss_before_gib"] <= meta["peak_rss_gib"] < meta["weights_gib"]


def test_checkpointed_stages_are_measured():
    options = ["--device", "cpu", "--size", "XS", "--repeats", "2"]
    command = [sys.executable, "-m", "benchmarks.checkpointing", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for system in ("eager", "funcstage closures", "funcstage aten"):
        assert f"| {system} |" in run.stdout


def test_sharded_stages_are_measured_on_all_ranks(tmp_path):
    file = tmp_path / "out.json"
    options = ["--device", "cpu", "--size", "XS", "--repeats", "3", "--json", str(file)]
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "benchmarks.sharded"]
    run = subprocess.run([sys.executable, "-m", *launch, *options], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    results = {(r["layout"], r["system"]): r for r in json.loads(file.read_text())}
    systems = ("eager", "torch.compile", "funcstage aten", "funcstage aten, I and W at once")
    assert results.keys() == {(layout, system) for layout in ("tensor", "fsdp") for system in systems}
    for (_, system), result in results.items():
        assert 0 < result["total_ms"] < 1e5
        assert result["relative_error"] < 2e-2
        assert (result["held_after_forward_mib"] is None) == (not system.startswith("funcstage"))


def test_what_sites_cost_is_measured():
    command = [sys.executable, "-m", "benchmarks.sites", "--device", "cpu", "--repeats", "1"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for engine in ("uncompiled", "aten", "inductor"):
        assert f"| {engine} |" in run.stdout


def test_memory_with_the_optimizer_in_w_is_counted():
    options = ["--size", "XS", "--microbatches", "2", "--device", "meta"]
    command = [sys.executable, "-m", "benchmarks.optimizer", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for engine in ("uncompiled", "aten"):
        assert run.stdout.count(f"| {engine} | 2 | ") == 5


def test_deep_stages_are_measured():
    options = ["--backend", "aten", "--size", "XS", "--blocks", "1", "2", "--repeats", "2"]
    command = [sys.executable, "-m", "benchmarks.depth", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for system in ("repeated", "one program", "torch.compile"):
        assert f"2 blocks, {system}: first " in run.stdout


def test_pipelines_of_sharded_stages_are_measured_on_all_ranks(tmp_path):
    file = tmp_path / "out.json"
    options = ["--device", "cpu", "--size", "XS", "--mesh", "2,1,1", "--microbatches", "4", "--repeats", "2"]
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, "-m", *launch, "-m", "benchmarks.three_dimensions", *options]
    run = subprocess.run([*command, "--json", str(file)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    results = json.loads(file.read_text())
    assert len(results) == 5
    for result in results:
        assert 0 < result["step_ms"] < 1e6
        assert result["relative_error"] < 3e-2
        assert result["peak_mib"] is None, "there is nothing to see on a CPU"
