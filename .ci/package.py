"""Is the package fit for an index? Builds sdist and wheel, checks both, and uses the wheel on its own.

    python .ci/package.py    # needs build and twine, and torch in this environment

The sdist must hold what a packager tests with. The page that an index shows must have absolute links. The
wheel is installed into a new environment, which borrows what it requires from this one; the README's first
snippet and the console script must run there.
"""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from email.message import Message
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IN_SDIST = (
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "tests/conftest.py",
    "property_tests/conftest.py",
    "model_tests",
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        dist = Path(folder) / "dist"
        run(sys.executable, "-m", "build", "--outdir", str(dist), str(ROOT))  # the wheel out of the sdist
        (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
        run(sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel))
        check_sdist(sdist)
        check_page(metadata_of(wheel))
        use(wheel, Path(folder) / "venv")
    print("the package is fit for an index")


def check_sdist(path: Path) -> None:
    with tarfile.open(path) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    missing = [part for part in IN_SDIST if not any(f"{name}/".startswith(f"{part}/") for name in names)]
    assert not missing, f"not in the sdist: {missing}"


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def check_page(metadata: Message) -> None:
    page = metadata.get_payload()
    assert isinstance(page, str)
    relative = re.findall(r"\]\((?!https?://|#)([^)]*)\)", page)
    assert not relative, f"links that lead nowhere on an index: {relative}"
    assert metadata.get_all("Project-URL"), "there are no URLs"


def use(wheel: Path, folder: Path) -> None:
    """Run the README's first snippet where the package is installed from the wheel, and nowhere else."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(str(python), "-m", "pip", "install", "-q", "--no-deps", str(wheel))
    # Borrow what the wheel requires. The .pth files there are not read, and so no editable install is found.
    site = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
    Path(site, "required.pth").write_text(sysconfig.get_path("purelib") + "\n")
    snippet = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)[0]
    where = "import funcstage, sys\nassert funcstage.__file__.startswith(sys.prefix), funcstage.__file__"
    run(str(python), "-c", f"{snippet}\n{where}\nprint(sorted(param_grads))", cwd=folder)
    run(str(python.with_name("funcstage")), "--version", cwd=folder)
    run(str(python.with_name("funcstage")), "timeline", "--ranks", "2", cwd=folder)


def run(*command: str, cwd: Path = ROOT) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, cwd=cwd, env=environment, check=True)


if __name__ == "__main__":
    main()
