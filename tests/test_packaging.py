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


def test_the_recipe_for_conda_asks_for_what_the_package_does() -> None:
    recipe = (ROOT / "packaging" / "conda" / "recipe.yaml").read_text()
    assert f'version: "{fs.__version__}"' in recipe
    named = {"torch": "pytorch", "typing-extensions": "typing_extensions", "matplotlib": "matplotlib-base"}
    extras = PROJECT["project"]["optional-dependencies"]
    asked = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    asked += [*extras["demo"], *extras["schedules"], *extras["interactive"]]
    lines = {line.strip().removeprefix("- ") for line in recipe.splitlines()}
    for requirement in asked:
        name, bound = re.fullmatch(r"([a-z-]+)(.*)", requirement).groups()  # type: ignore[union-attr]
        assert " ".join([named.get(name, name), *([bound] if bound else [])]) in lines
    (command,) = PROJECT["project"]["scripts"].items()
    assert " = ".join(command) in lines
    assert f"python {PROJECT['project']['requires-python']}" in lines
