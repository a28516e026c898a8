"""Environment for the packages of other projects that a benchmark compares with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def peers_python(folder: Path, packages: tuple[str, ...]) -> Path:
    """Create an environment with these packages and those of this one, unless it exists; return its interpreter."""
    folder = folder.absolute()
    python, installed = folder / "bin" / "python", folder / "installed"
    if not installed.exists() or installed.read_text().split() != list(packages):
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        site = next((folder / "lib").glob("python*/site-packages"))
        main = next(path for path in sys.path if path.endswith("site-packages"))
        (site / "job.pth").write_text(main + "\n")
        quiet = ["--quiet", "--disable-pip-version-check"]
        subprocess.run([python, "-m", "pip", "install", *quiet, *packages], check=True)
        installed.write_text("\n".join(packages) + "\n")
    return python
