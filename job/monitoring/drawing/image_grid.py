"""Images in a grid, each with a frame and a caption."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from job.monitoring.drawing.canvas import BLACK, GREEN, GREY, LIGHT, RED, Canvas, Colour, Figure, cut_to_width
from job.monitoring.drawing.class_labels import shortened
from job.monitoring.drawing.thumbnails import SIZE

FRAME = 4
"""Width of a tile's frame, in pixels."""
GAP = 6
TEXT = 18
"""Size of captions, in pixels: TensorBoard shows the grid at half its size."""
LINE = 22
"""Height of a line of a caption."""
TITLE = 28
MOST_LABELS = 3
"""Labels of one image that a caption names."""

UNREADABLE = "cannot be read"


@dataclass(frozen=True)
class Tile:
    """An image of a grid.

    Attributes:
        image: JPEG or PNG, or the image itself; None: an empty tile.
        caption: lines below it.
        colour: of its frame.
    """

    image: bytes | Image.Image | None
    caption: tuple[str, ...]
    colour: Colour = GREY


def grid(title: str, tiles: Sequence[Tile], most_bytes: int, size: int = SIZE) -> Figure:
    """Tiles in rows, as a JPEG.

    Args:
        title: line above them.
        tiles: at least one.
        most_bytes: limit on the JPEG.
        size: height and width of an image, in pixels.
    """
    columns = math.ceil(math.sqrt(len(tiles)))
    lines = max(len(tile.caption) for tile in tiles)
    width, height = size + 2 * FRAME + GAP, size + 2 * FRAME + LINE * lines + GAP
    canvas = Canvas(columns * width + GAP, TITLE + math.ceil(len(tiles) / columns) * height, scale=1)
    canvas.text((GAP, 4), cut_to_width(title, canvas.width - 2 * GAP, TEXT), TEXT)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        left, top = GAP + column * width, TITLE + row * height
        canvas.rectangle((left, top, left + size + 2 * FRAME, top + size + 2 * FRAME), tile.colour)
        canvas.rectangle((left + FRAME, top + FRAME, left + FRAME + size, top + FRAME + size), LIGHT)
        if tile.image is None:
            canvas.text((left + FRAME + size / 2, top + FRAME + size / 2), UNREADABLE, 12, "mm", GREY)
        else:
            canvas.paste(_opened(tile.image, size), left + FRAME, top + FRAME)
        for line, text in enumerate(tile.caption):
            below = top + size + 2 * FRAME + 1 + line * LINE
            canvas.text((left, below), cut_to_width(text, size + 2 * FRAME, TEXT), TEXT, colour=BLACK)
    return canvas.photograph(most_bytes)


def note(text: str, most_bytes: int) -> Figure:
    """A line of text in place of a grid."""
    canvas = Canvas(4 * SIZE, TITLE + GAP, scale=1)
    canvas.text((GAP, 4), cut_to_width(text, canvas.width - 2 * GAP, TEXT), TEXT)
    return canvas.photograph(most_bytes)


def prediction_caption(labels: Sequence[str], predicted: Sequence[str], confidence: float) -> tuple[str, str]:
    """Two lines: the prediction with its confidence, and the truth."""
    return f"{confidence:.0%} {join_labels(predicted)}", f"true: {join_labels(labels)}"


def join_labels(labels: Sequence[str]) -> str:
    """Join labels by commas, shortened; "none" without any."""
    shown = [shortened(label) for label in labels[:MOST_LABELS]]
    more = f" + {len(labels) - MOST_LABELS}" if len(labels) > MOST_LABELS else ""
    return (", ".join(shown) or "none") + more


def frame_colour(is_right: bool) -> Colour:
    """Green for a right prediction, red for a wrong one."""
    return GREEN if is_right else RED


def _opened(image: bytes | Image.Image, size: int) -> Image.Image:
    opened = Image.open(io.BytesIO(image), formats=("JPEG", "PNG")) if isinstance(image, bytes) else image
    return opened if opened.size == (size, size) else opened.resize((size, size))
