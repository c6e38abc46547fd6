"""Pages from outside docs/: the notebooks, and how all is tested and measured.

Everywhere in docs/, in links and in the navigation, a path that leaves docs/ means a file of the repository,
as it does to whoever reads the sources. On the site these files are under repository/.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page
from mkdocs_jupyter.plugin import NotebookFile

ROOT = Path(__file__).parents[2]
PAGES = ("TESTING.md", "*_tests/*.md", "benchmarks/*.md", "examples/*.ipynb")


def on_config(config: MkDocsConfig) -> None:
    """Resolve the navigation's patterns; a section without any page is left out."""
    assert config.nav is not None
    config.nav = [section for section in map(_resolved, config.nav) if section]


@event_priority(100)  # before the plugin that renders notebooks
def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages."""
    for pattern in PAGES:
        for path in sorted(ROOT.glob(pattern)):
            name = f"repository/{path.relative_to(ROOT).as_posix()}"
            files.append(File.generated(config, name, abs_src_path=str(path)))


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> None:
    """Tell the plugin's wrappers of notebooks where these are, which look for them in docs/."""
    for file in files:
        if isinstance(file, NotebookFile):
            file.abs_src_path = file.file.abs_src_path


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Lead links out of docs/ to where the files are on the site."""
    folder = posixpath.dirname(page.file.src_uri)

    def lead(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[1]))
        if not target.startswith("../"):
            return link[0]
        return f"]({posixpath.relpath(target.replace('..', 'repository', 1), folder or '.')}"

    return re.sub(r"\]\((\.\./[^)#]*)", lead, markdown)


def _resolved(section: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """A section of the navigation, with the files of the repository that its patterns match."""
    ((title, entries),) = section.items()
    found = [name for entry in entries for name in _matches(entry)]
    return {title: found} if found else {}


def _matches(entry: Any) -> list[Any]:
    if not str(entry).startswith("../"):
        return [entry]
    matches = sorted(ROOT.glob(entry.removeprefix("../")))
    return [f"repository/{path.relative_to(ROOT).as_posix()}" for path in matches]
