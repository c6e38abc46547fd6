"""What an index and a citing reader are told agrees with the package."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import funcstage as fs

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_is_told_alike_everywhere() -> None:
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert cited is not None
    assert PROJECT["project"]["version"] == fs.__version__ == cited[1]


def test_the_page_on_an_index_has_absolute_links_to_files_that_exist() -> None:
    page = (ROOT / "README.md").read_text()
    linked = re.findall(r"\]\((?!https?:|#)([^)]+)\)", page)
    assert [path for path in linked if not (ROOT / path).exists()] == []
    for rule in PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        page = re.sub(rule["pattern"], rule["replacement"], page)
    assert re.findall(r"\]\((?!https?://|#)([^)]*)\)", page) == []
    repository = PROJECT["project"]["urls"]["Repository"]
    assert page.count(f"]({repository}/blob/main/") + page.count("](https://raw.") == len(linked)


def test_the_sdist_holds_every_suite_and_every_page() -> None:
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert [path for path in included if not (ROOT / path).exists()] == []
    tracked = {"tests", "property_tests", "model_tests", "benchmarks", "examples", "docs"}
    assert tracked | {page.name for page in ROOT.glob("*.md")} <= {*included}
