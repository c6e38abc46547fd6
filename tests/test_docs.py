"""The guide and the reference: code runs, links lead somewhere, every public name is rendered once."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from funcstage.__main__ import main

DOCS = Path(__file__).parent.parent / "docs"
GUIDE = sorted(DOCS.glob("*.md"))
REFERENCE = sorted(DOCS.glob("reference/*.md"))
RENDERED = Counter(name for page in REFERENCE for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M))


@pytest.mark.parametrize("page", GUIDE, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_and_prints_what_is_shown(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    namespace: dict[str, Any] = {}
    printed = ""
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.M | re.S):
        if printed:
            assert (language, block) == ("text", printed)
            printed = ""
        elif language == "python":
            if name := re.match(r"# (\w+\.py)\n", block):
                Path(name[1]).write_text(block)
            exec(compile(block, str(page), "exec"), namespace)
            printed = capsys.readouterr().out
        elif language == "console":
            command, _, shown = block.partition("\n")
            assert main(shlex.split(command.removeprefix("$ python -m funcstage "))) == 0
            assert capsys.readouterr().out == shown
    assert not printed, "what is printed must be shown"


def test_every_command_and_option_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    page = (DOCS / "cli.md").read_text()

    def told(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            main([*arguments, "--help"])
        return capsys.readouterr().out

    commands = re.findall(r"^    (\w+) ", told(), re.M)
    assert sorted(commands) == sorted(re.findall(r"^## (\w+)$", page, re.M)) != []
    options = {option for name in commands for option in re.findall(r"--[a-z-]+", told(name))}
    assert [option for option in sorted(options) if option not in page] == []


@pytest.mark.parametrize(
    "module",
    [
        "funcstage",
        "funcstage.autograd",
        "funcstage.pipelining",
        "funcstage.testing",
        "funcstage.testing.strategies",
    ],
)
def test_every_public_name_of_a_module_is_rendered_once(module: str) -> None:
    def count(name: str) -> int:
        # A function of its module's name has the longer name, as the shorter one is the module's in a source.
        return RENDERED[f"{module}.{name}"] + RENDERED[f"{module}.{name}.{name}"]

    assert [name for name in importlib.import_module(module).__all__ if count(name) != 1] == []


def test_what_is_rendered_exists_and_is_no_module() -> None:
    for name in RENDERED:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
        assert name not in sys.modules


@pytest.mark.parametrize("page", [*GUIDE, *REFERENCE], ids=lambda page: page.stem)
def test_links_of_a_page_lead_to_files_and_to_names_where_they_are_rendered(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    paths = [target.split("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    assert [path for path in paths if path and not (page.parent / path).is_file()] == []
    names = dict(re.findall(r"^\[(\S+)\]: (\S+)$", text, re.M))
    assert names.keys() == {*re.findall(r"`\]\[(\S+)\]", text)}
    for name, target in names.items():
        path, _, anchor = target.partition("#")
        rendered = re.findall(r"^::: (\S+)$", (page.parent / path).read_text(), re.M)
        assert anchor == name
        assert name in rendered or name.rpartition(".")[0] in rendered


def test_the_navigation_names_every_page_and_notebook() -> None:
    root = DOCS.parent
    pages = {page.relative_to(DOCS).as_posix() for page in [*GUIDE, *REFERENCE]}
    for pattern in ("TESTING.md", "*_tests/*.md", "benchmarks/*.md", "examples/*.ipynb"):
        pages |= {f"repository/{path.relative_to(root).with_suffix('.md')}" for path in root.glob(pattern)}
    assert pages == {*re.findall(r'"(\S+\.md)"', (root / "zensical.toml").read_text())}
