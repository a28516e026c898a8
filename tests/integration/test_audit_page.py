"""The gallery of an audit in a real browser, headless Chromium; skipped where there is none."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from browser import chromium, needs_chromium
from PIL import Image
from support import FROZEN, options, picture_files, run_here, write_files

pytestmark = pytest.mark.integration

HOSTILE = "<svg onload=document.title=1>"


@needs_chromium
def test_the_gallery_shows_pictures_within_its_policy(tmp_path: Path) -> None:
    files = {key.replace("blue", HOSTILE): content for key, content in picture_files(["blue", "red"], 12).items()}
    files["red/copy.jpg"] = files["red/000.jpg"]
    files["red/broken.jpg"] = b"\xff\xd8\xff no image"
    root = write_files(tmp_path / "images", files)
    result = run_here("audit", *options(FROZEN, data__root=root, run_dir=tmp_path / "run"))
    assert result.returncode == 0, result.output
    page, shot = tmp_path / "run" / "audit" / "audit.html", tmp_path / "shot.png"
    drawn = chromium(tmp_path, page.as_uri(), f"--screenshot={shot}", "--window-size=1200,1600")
    assert "Content Security Policy" not in drawn.stderr, drawn.stderr
    pixels = np.asarray(Image.open(io.BytesIO(shot.read_bytes())).convert("RGB"), np.float64)
    red = (pixels[:, :, 0] > 150) & (pixels[:, :, 1] < 110) & (pixels[:, :, 2] < 110)
    assert red.sum() > 2 * 60 * 60  # two thumbnails of the copies
    content = chromium(tmp_path, page.as_uri(), "--dump-dom").stdout
    assert "<svg" not in content
    assert "<title>Audit of" in content
    assert content.count("<figure") >= 3
    assert "no picture" in content
