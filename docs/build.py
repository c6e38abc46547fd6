"""Build the site: lay out its pages in build/pages/, from which zensical writes site/.

In the links of docs/, a path that leaves docs/ means a file of the repository, as it does to whoever reads
the sources. On the site, and in the navigation of zensical.toml, these files are under repository/, and
notebooks are Markdown.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path

from nbconvert import MarkdownExporter
from nbconvert.preprocessors.coalescestreams import CoalesceStreamsPreprocessor

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "build" / "pages"
SITE = ROOT / "site"


def lay_out() -> None:
    """Write the pages of docs/, and those of the repository that the navigation names."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for page in PAGES.rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        page.write_text(_led(text, page.relative_to(PAGES).parent.as_posix()), encoding="utf-8")
    listed = set(re.findall(r'"(\S+\.md)"', (ROOT / "zensical.toml").read_text(encoding="utf-8")))
    for name in (name for name in listed if name.startswith("repository/")):
        page, source = PAGES / name, ROOT / name.removeprefix("repository/")
        page.parent.mkdir(parents=True, exist_ok=True)
        if source.exists():
            shutil.copy(source, page)
        else:
            _write_notebook(source.with_suffix(".ipynb"), page)
    if odd := listed ^ {page.relative_to(PAGES).as_posix() for page in PAGES.rglob("*.md")}:
        sys.exit(f"either not in the navigation, or not in docs/: {', '.join(sorted(odd))}")


def build() -> None:
    """Write the site anew; zensical stops at what is no page, anchor or name, and this at what is no file."""
    shutil.rmtree(SITE, ignore_errors=True)
    # Without its cache, in which the reference would stay as it was when the sources have changed.
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    if subprocess.run(command, cwd=ROOT).returncode != 0:
        sys.exit(1)
    for page in SITE.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        for file in re.findall(r'<[^>]* (?:src|href)="([^/":#][^":#]*)[#"]', text):
            if not (page.parent / file).exists():
                sys.exit(f"{page.relative_to(SITE)}: there is no {file}")
    # What pages opened from disk search: they may not read the .json.
    index = (SITE / "search.json").read_text(encoding="utf-8")
    (SITE / "search.js").write_text(f"var __index = {index}", encoding="utf-8")


def _led(markdown: str, folder: str) -> str:
    """The text of a page, with links that leave docs/ led to where the files are on the site."""

    def lead(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[1]))
        if not target.startswith("../"):
            return link[0]
        target = re.sub(r"\.ipynb$", ".md", target.replace("..", "repository", 1))
        return f"]({posixpath.relpath(target, folder)}"

    return re.sub(r"\]\((\.\./[^)#]*)", lead, markdown)


def _write_notebook(source: Path, page: Path) -> None:
    """A notebook as Markdown, with its pictures in a folder beside it."""
    exporter = MarkdownExporter(preprocessors=[CoalesceStreamsPreprocessor])
    text, resources = exporter.from_filename(str(source), {"output_files_dir": source.stem})
    page.write_text(text, encoding="utf-8")
    for name, picture in resources["outputs"].items():
        path = page.parent / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture)


if __name__ == "__main__":
    lay_out()
    build()
