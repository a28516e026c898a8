"""Pages in a real browser, headless Chromium."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OFFLINE = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


def chromium(folder: Path, url: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Open ``url``, with a profile in ``folder``; messages of the page's console are in ``stderr``."""
    fixed = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={folder}/profile"]
    line = [str(CHROMIUM), *fixed, *OFFLINE, "--enable-logging=stderr", "--v=0", *options, url]
    return subprocess.run(line, capture_output=True, text=True, timeout=300, check=True)
