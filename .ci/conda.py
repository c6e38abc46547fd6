"""Does the recipe for conda build, and does what it builds pass its tests? Asks no channel of conda's.

    python .ci/conda.py    # needs py-rattler and py-rattler-build, and torch in this environment

rattler-build takes what the recipe requires from a channel that is made here: this Python, pip and hatchling
from the index, and for torch and the rest packages that lead to this environment, with the versions that it
has. This shows that the recipe can be solved, built, installed, imported and called, and not that
conda-forge has what it asks for.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import distributions, version
from pathlib import Path

from rattler.index import index_fs
from rattler_build import RenderConfig, Stage0Recipe, ToolConfiguration, VariantConfig, assemble_package

RECIPE = Path(__file__).resolve().parents[1] / "packaging" / "conda" / "recipe.yaml"
PYTHON = "{}.{}".format(*sys.version_info)
PLATFORM = "linux-64"
BORROWED = {
    "pytorch": "torch",
    "optree": "optree",
    "networkx": "networkx",
    "typing_extensions": "typing_extensions",
}


def main() -> None:
    if PYTHON != "3.11":
        sys.exit(f"the recipe builds with Python 3.11, and this is {PYTHON}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RATTLER_CACHE_DIR"] = str(Path(folder, "cache"))  # others' packages have the same names
        channel, staged = Path(folder, "channel"), Path(folder, "staged")
        (channel / "noarch").mkdir(parents=True)
        stage_python(staged / "python")
        assemble(channel, staged / "python", "python", f"{PYTHON}.0", [])
        stage_build_tools(channel, staged)
        for name, distribution in BORROWED.items():
            site = site_packages(staged / name)
            (site / f"{name}.pth").write_text(sysconfig.get_path("purelib") + "\n")
            assemble(channel, staged / name, name, version(distribution).partition("+")[0], ["python"])
        asyncio.run(index_fs(str(channel)))
        build(channel, Path(folder, "built"))
    print("the recipe for conda builds")


def stage_python(folder: Path) -> None:
    """This interpreter, without what it has beside the standard library."""
    (folder / "bin").mkdir(parents=True)
    shutil.copy2(Path(sys.base_prefix, "bin", f"python{PYTHON}"), folder / "bin")
    (folder / "bin" / "python").symlink_to(f"python{PYTHON}")
    left_out = shutil.ignore_patterns("*-packages", "test", "tests", "__pycache__", "config-*", "idlelib")
    shutil.copytree(sysconfig.get_path("stdlib"), folder / "lib" / f"python{PYTHON}", ignore=left_out)
    for library in Path(sysconfig.get_config_var("LIBDIR")).glob("libpython3*.so*"):
        shutil.copy2(library, folder / "lib" / library.name)


def stage_build_tools(channel: Path, staged: Path) -> None:
    target = staged / "tools"
    install = [sys.executable, "-m", "pip", "install", "-q", "--target", str(target)]
    subprocess.run([*install, "pip", "hatchling", "hatch-fancy-pypi-readme>=24.1"], check=True)
    found = {each.metadata["Name"].lower(): each for each in distributions(path=[str(target)])}
    behind = [name for name in found if name not in ("pip", "hatchling", "hatch-fancy-pypi-readme")]
    for name, tool in found.items():
        site = site_packages(staged / name)
        for file in tool.files or ():
            if (target / file).is_file() and file.parts[0] not in ("..", "bin"):
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(target / file, site / file)
        assemble(channel, staged / name, name, tool.version, ["python", *behind * (name == "hatchling")])


def site_packages(folder: Path) -> Path:
    path = folder / "lib" / f"python{PYTHON}" / "site-packages"
    path.mkdir(parents=True)
    return path


def assemble(channel: Path, files: Path, name: str, number: str, depends: list[str]) -> None:
    out = channel / PLATFORM
    out.mkdir(exist_ok=True)
    assemble_package(name, number, PLATFORM, "0", out, files_dir=files, depends=depends, detect_prefix=False)


def build(channel: Path, out: Path) -> None:
    (recipe,) = Stage0Recipe.from_file(RECIPE).render(VariantConfig(), RenderConfig())
    recipe.run_build(ToolConfiguration(test_strategy="native"), out, [channel.as_uri()])


if __name__ == "__main__":
    main()
