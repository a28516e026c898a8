"""The gallery of an audit in a real browser, headless Chromium; skipped where there is none."""

from __future__ import annotations

import io
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import options, picture_files, run_here, write_files

pytestmark = pytest.mark.integration

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OFFLINE = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
SETTINGS: dict[str, object] = {
    "model.backbone": "timm/test_resnet",
    "model.weights": "none",
    "data.image_size": 32,
    "data.num_workers": 1,
    "trainer.accelerator": "cpu",
    "trainer.precision": "32-true",
}
HOSTILE = "<svg onload=document.title=1>"


def chromium(folder: Path, page: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    fixed = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={folder}/profile"]
    line = [str(CHROMIUM), *fixed, *OFFLINE, "--enable-logging=stderr", "--v=0", *settings, page.as_uri()]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_gallery_shows_pictures_within_its_policy(tmp_path: Path) -> None:
    files = {key.replace("blue", HOSTILE): content for key, content in picture_files(["blue", "red"], 12).items()}
    files["red/copy.jpg"] = files["red/000.jpg"]
    files["red/broken.jpg"] = b"\xff\xd8\xff no image"
    root = write_files(tmp_path / "images", files)
    result = run_here("audit", *options(SETTINGS, data__root=root, run_dir=tmp_path / "run"))
    assert result.returncode == 0, result.output
    page, shot = tmp_path / "run" / "audit" / "audit.html", tmp_path / "shot.png"
    drawn = chromium(tmp_path, page, f"--screenshot={shot}", "--window-size=1200,1600")
    assert "Content Security Policy" not in drawn.stderr, drawn.stderr
    pixels = np.asarray(Image.open(io.BytesIO(shot.read_bytes())).convert("RGB"), np.float64)
    red = (pixels[:, :, 0] > 150) & (pixels[:, :, 1] < 110) & (pixels[:, :, 2] < 110)
    assert red.sum() > 2 * 60 * 60  # two thumbnails of the copies
    content = chromium(tmp_path, page, "--dump-dom").stdout
    assert "<svg" not in content
    assert "<title>Audit of" in content
    assert content.count("<figure") >= 3
    assert "no picture" in content
