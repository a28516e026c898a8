"""Images of the demo: scikit-learn's 1,797 handwritten digits, as PNG files in class folders.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998 (the test part, as bundled with scikit-learn; BSD licence).
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def digit_images() -> dict[str, bytes]:
    """Return PNG content by key, ``CLASS/NUMBER.png``: 8x8 greyscale, white on black."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    files = {}
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        image = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        files[f"{label}/{number:04d}.png"] = buffer.getvalue()
    return files
