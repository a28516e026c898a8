"""Drawing with Pillow: lines, rectangles and text, encoded within a limit of bytes."""

from __future__ import annotations

import functools
import io
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Point = tuple[float, float]

BLACK, WHITE, GREY, LIGHT = (30, 30, 30), (255, 255, 255), (130, 130, 130), (225, 225, 225)
GREEN, RED, BLUE = (30, 140, 60), (210, 45, 35), (30, 100, 190)

FONT = "DejaVuSans.ttf"
"""Has Latin, Greek, Cyrillic and Arabic letters. Pillow's own font, which is used where it is missing, has ASCII."""
SCALE = 2
"""Pillow draws lines without antialiasing: charts are drawn larger, and reduced."""
COLOURS = (128, 32, 8)
"""Sizes of a chart's palette, the first of which that keeps to the limit is used."""
JPEG_QUALITIES = (85, 75, 60, 45, 30, 15, 5)


class Figure(NamedTuple):
    """An encoded image.

    Attributes:
        content: of a PNG or JPEG file.
        width: in pixels.
        height: in pixels.
    """

    content: bytes
    width: int
    height: int


class Canvas:
    """A white image to draw on, in pixels from the upper left corner.

    Args:
        width: in pixels.
        height: in pixels.
        scale: how many times larger it is drawn than encoded.
    """

    def __init__(self, width: int, height: int, scale: int = SCALE) -> None:
        self.width, self.height, self.scale = width, height, scale
        self.image = Image.new("RGB", (width * scale, height * scale), WHITE)
        self._draw = ImageDraw.Draw(self.image)

    def rectangle(self, box: Sequence[float], fill: Colour | None = None, outline: Colour | None = None) -> None:
        """Draw a rectangle: left, top, right, bottom, the last two exclusive."""
        left, top, right, bottom = (round(value * self.scale) for value in box)
        if right > left and bottom > top:
            self._draw.rectangle((left, top, right - 1, bottom - 1), fill, outline, self.scale if outline else 0)

    def line(self, points: Sequence[Point], colour: Colour = BLACK, width: float = 1.0) -> None:
        """Draw a line through points."""
        scaled = [(x * self.scale, y * self.scale) for x, y in points]
        self._draw.line(scaled, colour, max(round(width * self.scale), 1), joint="curve")

    def text(self, at: Point, text: str, size: int = 12, anchor: str = "la", colour: Colour = BLACK) -> None:
        """Draw a line of text; see Pillow's text anchors."""
        font = font_of(size * self.scale)
        self._draw.text((at[0] * self.scale, at[1] * self.scale), drawable(text), colour, font, anchor)

    def vertical_text(self, at: Point, text: str, size: int = 12, colour: Colour = BLACK) -> None:
        """Draw a line of text that runs upwards from its lower end, centred at ``at[0]``."""
        font, text = font_of(size * self.scale), drawable(text)
        width, height = int(font.getlength(text)) + 2, round(1.4 * size * self.scale)
        line = Image.new("L", (width, height))
        ImageDraw.Draw(line).text((0, height / 2), text, 255, font, "lm")
        turned = line.rotate(90, expand=True)
        corner = (round(at[0] * self.scale - height / 2), round(at[1] * self.scale - width))
        self.image.paste(colour, (*corner, corner[0] + turned.width, corner[1] + turned.height), turned)

    def paste(self, image: Image.Image, left: int, top: int) -> None:
        """Lay another image on this one."""
        self.image.paste(image, (left * self.scale, top * self.scale))

    def chart(self, most_bytes: int) -> Figure:
        """PNG of a drawing; with fewer colours where it would exceed ``most_bytes``."""
        image = self.image.reduce(self.scale) if self.scale > 1 else self.image
        content = b""
        for colours in COLOURS:
            buffer = io.BytesIO()
            image.quantize(colours).save(buffer, "PNG", optimize=True)
            content = buffer.getvalue()
            if len(content) <= most_bytes:
                break
        return Figure(content, self.width, self.height)

    def photograph(self, most_bytes: int) -> Figure:
        """JPEG of photographs; at a lower quality where it would exceed ``most_bytes``."""
        image = self.image.reduce(self.scale) if self.scale > 1 else self.image
        return Figure(jpeg(image, most_bytes), self.width, self.height)


def jpeg(image: Image.Image, most_bytes: int) -> bytes:
    """JPEG at the best quality that keeps to ``most_bytes``, or at the lowest one."""
    content = b""
    for quality in JPEG_QUALITIES:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, optimize=True)
        content = buffer.getvalue()
        if len(content) <= most_bytes:
            break
    return content


def cut_to_width(text: str, width: float, size: int = 12) -> str:
    """``text``, or its beginning, so that it takes at most ``width`` pixels."""
    font, text = font_of(size), drawable(text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def text_width(text: str, size: int = 12) -> float:
    """Width of a line of text, in pixels."""
    return font_of(size).getlength(drawable(text))


def drawable(text: str) -> str:
    """``text`` in characters that the font has: ``é`` as ``e`` where there is no ``é``, others as ``?``."""
    return text if text.isascii() else "".join(map(_drawable, text))


@functools.cache
def font_of(size: int) -> ImageFont.FreeTypeFont:
    """The font, by size in pixels."""
    try:
        return ImageFont.truetype(FONT, size)
    except OSError:
        font = ImageFont.load_default(size)
        assert isinstance(font, ImageFont.FreeTypeFont), "Pillow is built without FreeType"
        return font


@functools.lru_cache(maxsize=4096)
def _drawable(character: str) -> str:
    base = unicodedata.normalize("NFKD", character)
    return next((each for each in (character, *base) if each.isascii() or _is_in_font(each)), "?")


def _is_in_font(character: str) -> bool:
    missing, drawn = (font_of(24).getmask(each) for each in ("\uffff", character))
    return drawn.size != missing.size or bytes(drawn) != bytes(missing)
