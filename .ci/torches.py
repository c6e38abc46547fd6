"""Run the slice of the tests that takes each private name of torch through its use, on several torches.

    python .ci/torches.py                # on all that funcstage is said to work with
    python .ci/torches.py 2.11.0 2.16.0  # on these

Each gets a new virtual environment with what the slice needs, which is gone afterwards.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
RELEASES = runpy.run_path(str(ROOT / "funcstage" / "_torch" / "versions.py"))["RELEASES"]
NEEDED = ["numpy>=1.26", "pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.5"]
SLICE = ["-m", "versions", "-n", "0", "tests/_torch/test_private_api.py"]


def passes(release: str) -> bool:
    """Tell whether the slice passes on a release of torch."""
    print(f"torch {release}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin" / "python")
        install = [python, "-m", "pip", "install", "-q", f"torch=={release}", "-e", str(ROOT), *NEEDED]
        environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        return all(
            subprocess.run(command, cwd=ROOT, env=environment).returncode == 0
            for command in (install, [python, "-m", "pytest", *SLICE])
        )


if __name__ == "__main__":
    failed = [release for release in sys.argv[1:] or RELEASES if not passes(release)]
    sys.exit(f"The slice fails on torch {', '.join(failed)}." if failed else 0)
