"""Thumbnails of what models show on an image: boxes, masks and label maps, drawn with Pillow."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["blend_labels", "blend_masks", "colour_of", "draw_boxes", "jpeg_of", "thumbnail_of"]

SIDE = 360
"""Longest side of a thumbnail in pixels."""
DIFFERENCE = (220, 20, 30)
"""Colour of what only one of the models shows."""


def thumbnail_of(image: Image.Image) -> Image.Image:
    """Return an RGB copy whose longest side is at most `SIDE` pixels."""
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    return small


def jpeg_of(image: Image.Image) -> bytes:
    """Return an image as a JPEG file of some kilobytes."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return buffer.getvalue()


def colour_of(number: int) -> tuple[int, int, int]:
    """Return a bright colour for a class: neighbouring numbers are far apart on the wheel of hues."""
    red, green, blue = colorsys.hsv_to_rgb((number * 0.618034 + 0.58) % 1, 0.85, 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_boxes(
    image: Image.Image,
    boxes: np.ndarray,
    texts: Sequence[str],
    colours: Iterable[tuple[int, int, int]],
    alone: Sequence[bool],
) -> None:
    """Draw boxes with their texts onto an image.

    Args:
        image: RGB image, which is changed.
        boxes: corners x1, y1, x2, y2 in pixels of the image, (k, 4).
        texts: text at each box; characters that the font lacks become question marks.
        colours: colour of each box.
        alone: whether a box is drawn thick and red, because only this model shows it.
    """
    pen, font = ImageDraw.Draw(image), ImageFont.load_default()
    for box, text, colour, lone in zip(boxes.tolist(), texts, colours, alone, strict=True):
        ink = DIFFERENCE if lone else colour
        x1, y1, x2, y2 = box
        pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=ink, width=4 if lone else 2)
        told = text.encode("ascii", "replace").decode()
        place = (max(x1, 0) + 2, max(y1 - 12, 0))
        pen.rectangle(pen.textbbox(place, told, font=font), fill=ink)
        pen.text(place, told, fill=(255, 255, 255), font=font)


def blend_labels(image: Image.Image, labels: np.ndarray, changed: np.ndarray) -> Image.Image:
    """Return an image with the colours of the classes of its pixels over it.

    Args:
        image: RGB image.
        labels: class of each pixel, (height, width) of any size, which is sampled.
        changed: whether each pixel is painted red, because the models differ there, of the same shape.
    """
    nearest = Image.Resampling.NEAREST
    small = np.asarray(Image.fromarray(labels.astype(np.uint8)).resize(image.size, nearest))
    colours = np.array([colour_of(number) for number in range(256)], np.uint8)
    blended = Image.blend(image, Image.fromarray(colours[small]), 0.55)
    marks = Image.fromarray(np.where(changed, 255, 0).astype(np.uint8)).resize(image.size, nearest)
    blended.paste(DIFFERENCE, (0, 0), marks)
    return blended


def blend_masks(image: Image.Image, masks: Sequence[np.ndarray], colours: Sequence[tuple[int, int, int]]) -> None:
    """Lay masks of objects over an image, each in its colour.

    Args:
        image: RGB image, which is changed.
        masks: bool (height, width) of any size.
        colours: colour of each mask.
    """
    for mask, colour in zip(masks, colours, strict=True):
        small = Image.fromarray(np.where(mask, 140, 0).astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
        image.paste(colour, (0, 0), small)
