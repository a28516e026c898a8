"""The page of a report in a real browser, headless Chromium; skipped where there is none."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from browser import chromium, needs_chromium
from PIL import Image
from support import fit_here

pytestmark = pytest.mark.integration


@needs_chromium
def test_the_page_is_drawn_in_light_and_dark_and_within_its_policy(tmp_path: Path) -> None:
    page = fit_here(tmp_path, trainer__max_epochs=2) / "report.html"
    brightness = []
    for name, scheme in (("light", 1), ("dark", 0)):
        shot = tmp_path / f"{name}.png"
        done = chromium(
            tmp_path,
            page.as_uri(),
            f"--screenshot={shot}",
            "--window-size=1200,2400",
            f"--blink-settings=preferredColorScheme={scheme}",
        )
        assert "Content Security Policy" not in done.stderr, done.stderr
        pixels = np.asarray(Image.open(io.BytesIO(shot.read_bytes())).convert("L"), np.float64)
        brightness.append(float(np.median(pixels)))
        assert pixels.std() > 5  # not empty
    assert brightness[0] > 200 > 100 > brightness[1]
    drawn = chromium(tmp_path, page.as_uri(), "--dump-dom").stdout
    assert drawn.count("<polyline") >= 2
    assert "Confusion matrix" in drawn
