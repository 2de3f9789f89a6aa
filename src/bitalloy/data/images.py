"""Images: reading, fitting onto the model's canvas, normalising."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from bitalloy.core.errors import DataError
from bitalloy.core.limits import IMAGE_SHARE, refuse_beyond
from bitalloy.core.records import Record, TensorSpec

Layout = Literal["NCHW", "NHWC"]
Fit = Literal["letterbox", "stretch", "crop"]

_PIXELS: dict[str, Literal["float32", "float16", "uint8"]] = {
    "FLOAT": "float32",
    "FLOAT16": "float16",
    "UINT8": "uint8",
}
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
"""Suffixes of image files, in lower case."""
_YOLO_TASKS = frozenset({"detection", "instance"})
_IMAGE_TASKS = _YOLO_TASKS | {"semantic"}
_EXAMPLE: dict[Layout, str] = {"NCHW": "1 3 640 640", "NHWC": "1 640 640 3"}
_FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
"""Pillow's names of these kinds. It would guess others from the content, and start programs to read some."""
_SOURCE = "bitalloy.path"
"""Key under which an image knows its file."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Geometry(Record, frozen=True, kw_only=True):
    """Where an image lies on the model's canvas: canvas x = image x * ratio_x + left, in pixels."""

    ratio_x: float
    ratio_y: float
    left: int
    """Canvas x of the image's left edge, in pixels; negative where the image was cropped."""
    top: int

    def to_canvas(self, boxes: np.ndarray) -> np.ndarray:
        """Map boxes (k, 4), corners x1, y1, x2, y2 in image pixels, to canvas pixels."""
        ratio, shift = self._ratio_shift()
        return np.asarray(boxes * ratio + shift)

    def to_image(self, boxes: np.ndarray) -> np.ndarray:
        """Map boxes (k, 4), corners x1, y1, x2, y2 in canvas pixels, to image pixels, not clipped to the image."""
        ratio, shift = self._ratio_shift()
        return np.asarray((boxes - shift) / ratio)

    def _ratio_shift(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array([self.ratio_x, self.ratio_y] * 2), np.array([self.left, self.top] * 2)


class ImageSpec(Record, frozen=True, kw_only=True):
    """How an image becomes the feed of `input`: fitted, then (pixel * scale - mean) / std."""

    input: str
    height: int
    width: int
    channels: int = 3
    """Number of channels: 3 for RGB, 1 for grey."""
    layout: Layout = "NCHW"
    fit: Fit = "letterbox"
    """How to fit: `letterbox` keeps the ratio and pads, `stretch` ignores the ratio, `crop` cuts out the centre."""
    pad: int = 114
    """Grey value of the border that letterbox adds, 0..255."""
    scale: float = 1 / 255
    mean: tuple[float, ...] = ()
    """Mean per channel, after `scale`; empty for zeros."""
    std: tuple[float, ...] = ()
    """Standard deviation per channel, after `scale`; empty for ones."""
    dtype: Literal["float32", "float16", "uint8"] = "float32"

    def describe(self) -> str:
        """Describe the preparation, e.g. `letterbox 640x640 (height x width) pad 114, RGB, /255, NCHW as 'images'`."""
        pad = f" pad {self.pad}" if self.fit == "letterbox" else ""
        parts = [
            f"{self.fit} {self.height}x{self.width} (height x width){pad}",
            "RGB" if self.channels == 3 else "grey",
        ]
        if self.scale != 1:
            inverse = 1 / self.scale
            whole = abs(inverse - round(inverse)) < 1e-6 * abs(inverse)
            parts.append(f"/{round(inverse)}" if whole else f"*{self.scale:g}")
        parts += [f"minus mean {list(self.mean)}"] if self.mean else []
        parts += [f"divided by std {list(self.std)}"] if self.std else []
        parts += [self.dtype] if self.dtype != "float32" else []
        return ", ".join([*parts, f"{self.layout} as '{self.input}'"])


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageOptions:
    """Given settings for the preparation of images; what is None is inferred."""

    size: int | tuple[int, int] | None = None
    """Side, or (height, width) in pixels, for inputs with symbolic dimensions."""
    scale: float | None = None
    """Factor by which pixels of 0..255 are multiplied."""
    mean: Sequence[float] | None = None
    """Mean, per channel or one for all, after `scale`."""
    std: Sequence[float] | None = None
    """Standard deviation, per channel or one for all, after `scale`."""
    layout: Layout | None = None
    """Position of the channel axis, for inputs whose shape does not tell."""
    fit: Fit | None = None
    """How an image is fitted to the input's height and width."""

    @property
    def normalises(self) -> bool:
        """Whether any of `scale`, `mean` and `std` is given."""
        return any(o is not None for o in (self.scale, self.mean, self.std))


_NOTHING_GIVEN = ImageOptions()


def infer_image_spec(
    inputs: tuple[TensorSpec, ...], *, task: str | None, options: ImageOptions = _NOTHING_GIVEN
) -> ImageSpec | None:
    """Find the image input and how images are prepared for it.

    1. `detection` and `instance` take YOLO's letterbox, RGB in 0..1.
    2. Everything else is stretched and normalised with ImageNet's mean and standard deviation, unless it has
       one channel or any of `scale`, `mean`, `std` is given: what is not given is then 1/255, 0 and 1.
    3. UINT8 inputs get raw pixels.

    Args:
        inputs: inputs of the model.
        task: name of the task, or None where it is unknown.
        options: given settings, which override what is inferred.

    Returns:
        The preparation; None for a model without an image input, unless the task or an option asks for images.

    Raises:
        DataError: a needed image input is missing, its size is unknown, or options do not fit it.
    """
    found = [(spec, place) for spec in inputs if (place := _layout(spec, options.layout)) is not None]
    if not found:
        if task not in _IMAGE_TASKS and options == _NOTHING_GIVEN:
            return None
        raise DataError(no_image_input(inputs))
    spec, place = min(found, key=lambda f: _channels(*f) != 3)  # 1xLxL masks come after an RGB input
    height, width = _size(spec, place, options.size)
    channels, dtype, yolo = _channels(spec, place), _PIXELS[spec.dtype], task in _YOLO_TASKS
    scale, mean, std = options.scale, options.mean, options.std
    if dtype == "uint8" and (scale not in (None, 1) or mean is not None or std is not None):
        raise DataError(f"Input '{spec.name}' takes UINT8 pixels, so scale, mean and std cannot be applied. Omit them.")
    imagenet = not yolo and channels == 3 and dtype != "uint8" and not options.normalises
    return ImageSpec(
        input=spec.name,
        height=height,
        width=width,
        channels=channels,
        layout=place,
        fit=options.fit or ("letterbox" if yolo else "stretch"),
        scale=1.0 if dtype == "uint8" else 1 / 255 if scale is None else scale,
        mean=IMAGENET_MEAN if imagenet else _per_channel("mean", mean or (), channels),
        std=IMAGENET_STD if imagenet else _per_channel("std", std or (), channels),
        dtype=dtype,
    )


def no_image_input(inputs: Iterable[TensorSpec]) -> str:
    """Return the message for a model that takes no image where images came."""
    came = ", ".join(f"'{i.name}' {describe_spec(i)}" for i in inputs)
    return (
        f"No input takes an image: the model has {came}; expected 4 dimensions with 1 or 3 channels, "
        "FLOAT, FLOAT16 or UINT8. Feed it with .npz files, one a sample, whose keys are the input names."
    )


def describe_spec(spec: TensorSpec) -> str:
    """Describe the type and shape of a tensor, e.g. `FLOAT [1, 3, height, 640]`."""
    return f"{spec.dtype} [{', '.join(map(str, spec.shape))}]"


def _layout(spec: TensorSpec, wanted: Layout | None) -> Layout | None:
    """Place of the channels; None where the input takes no image. A symbolic channel counts only if asked for."""
    if len(spec.shape) != 4 or spec.dtype not in _PIXELS:
        return None
    places: tuple[tuple[Layout, int | str], ...] = (("NCHW", spec.shape[1]), ("NHWC", spec.shape[3]))
    if wanted is not None:
        return wanted if dict(places)[wanted] in (1, 3) or isinstance(dict(places)[wanted], str) else None
    return next((place for count in (3, 1) for place, dim in places if dim == count), None)


def _channels(spec: TensorSpec, place: Layout) -> int:
    dim = spec.shape[1 if place == "NCHW" else 3]
    return dim if isinstance(dim, int) else 3


def _size(spec: TensorSpec, place: Layout, size: int | tuple[int, int] | None) -> tuple[int, int]:
    dims = spec.shape[2:] if place == "NCHW" else spec.shape[1:3]
    wanted = (size, size) if size is None or isinstance(size, int) else size
    sides = [dim if isinstance(dim, int) else side for dim, side in zip(dims, wanted, strict=True)]
    height, width = sides
    if height is None or width is None:
        defaults = zip(spec.shape, _EXAMPLE[place].split(), strict=True)
        example = "x".join(str(d) if isinstance(d, int) else e for d, e in defaults)
        raise DataError(
            f"The size of input '{spec.name}' {describe_spec(spec)} is open. "
            f"Give it with --size 640 or --shape {spec.name}={example}."
        )
    if min(height, width) < 1 or any(s not in (None, side) for s, side in zip(wanted, sides, strict=True)):
        raise DataError(
            f"Size {size} does not fit input '{spec.name}' {describe_spec(spec)}. Omit --size or correct it."
        )
    return height, width


def _per_channel(what: str, given: Sequence[float], channels: int) -> tuple[float, ...]:
    values = tuple(given) * (channels if len(given) == 1 else 1)
    if values and (len(values) != channels or not np.isfinite(values).all() or (what == "std" and min(values) <= 0)):
        raise DataError(f"{what} {list(given)} does not fit: expected {channels} finite numbers, std above 0.")
    return values


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's content, hexadecimal.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        known = path.stat()
        return _hash(path.absolute(), known.st_ino, known.st_size, known.st_mtime_ns, known.st_ctime_ns)
    except OSError as error:
        raise DataError(f"Cannot read '{path}': {error.strerror}. Repair or remove it.") from error


@lru_cache(maxsize=1 << 16)
def _hash(path: Path, *changes: int) -> str:
    """Hash a file, which is read once as long as the numbers that every change of it moves are the same."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def opened_image(path: Path) -> Iterator[Image.Image]:
    """Open a file as an image whose pixels are not read yet, once its declared size is known to fit into memory.

    Raises:
        DataError: the file is no image of a kind of `IMAGE_SUFFIXES`, is damaged, or is too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is our own
            file = Image.open(path, formats=_FORMATS)
        with file:
            told = f"The image '{path}' declares {file.width} x {file.height} pixels"
            refuse_beyond(file.width * file.height * len(file.getbands()), told, DataError, divisor=IMAGE_SHARE)
            yield file
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(
            f"The image '{path}' declares more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels, the limit of Pillow, "
            "which takes it for a file that is made to fill memory. Scale it down or remove it."
        ) from error
    except Exception as error:  # Pillow's decoders raise a dozen unrelated types
        raise DataError(f"Cannot read the image '{path}': {error}. Repair or remove it.") from error


def open_image(path: Path, channels: int = 3) -> Image.Image:
    """Read an image, turned upright, as 8-bit RGB (3 channels) or grey (1).

    Raises:
        DataError: the file is no image, is damaged or too large, or has more than 8 bits a channel.
    """
    with opened_image(path) as file:
        file.load()
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith(("I", "F")):
        raise DataError(f"'{path}' has pixels of mode {image.mode}, expected 8 bits. Convert it, or feed .npz files.")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    found = image.convert("RGB" if channels == 3 else "L")
    found.info[_SOURCE] = str(path)
    return found


def refuse_enlarged(image: Image.Image, width: int, height: int) -> None:
    """Refuse to bring an image to a size, in pixels, that takes too much memory, such as that of a line made a square.

    Raises:
        DataError: it takes too much.
    """
    told = f"The image '{image.info.get(_SOURCE, 'in memory')}', {image.width} x {image.height} pixels, is brought to "
    needed = width * height * len(image.getbands())
    refuse_beyond(needed, f"{told}{width} x {height} before its borders are cut", DataError, divisor=IMAGE_SHARE)


def letterbox(image: Image.Image, height: int, width: int, pad: int = 114) -> tuple[np.ndarray, Geometry]:
    """Fit an image into (height, width), keeping its ratio, centred on grey; as Ultralytics' `LetterBox` does.

    Returns:
        The canvas, uint8 (height, width) or (height, width, 3), and where the image lies on it. Example: an
        image of 640x426 on 640x640 keeps its size and lies at left 0, top 107.
    """
    ratio = min(height / image.height, width / image.width)
    new_width, new_height = max(1, round(image.width * ratio)), max(1, round(image.height * ratio))
    pixels = _resize(image, new_height, new_width)
    left, top = round((width - new_width) / 2 - 0.1), round((height - new_height) / 2 - 0.1)
    canvas = np.full((height, width, *pixels.shape[2:]), pad, np.uint8)
    canvas[top : top + new_height, left : left + new_width] = pixels
    return canvas, Geometry(ratio_x=ratio, ratio_y=ratio, left=left, top=top)


def _resize(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Bilinear between the nearest four pixels, also when shrinking, where Pillow would average over more."""
    if height >= image.height and width >= image.width:
        return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    pixels = np.asarray(image)
    for axis, length in enumerate((height, width)):
        old = pixels.shape[axis]
        at = np.clip((np.arange(length) + 0.5) * (old / length) - 0.5, 0, old - 1)
        first = at.astype(np.intp)
        weight = (at - first).astype(np.float32).reshape((-1,) + (1,) * (pixels.ndim - axis - 1))
        low, high = (pixels.take(i, axis).astype(np.float32) for i in (first, np.minimum(first + 1, old - 1)))
        pixels = low + (high - low) * weight
    return np.asarray((pixels + 0.5).astype(np.uint8))


def image_feed(image: Image.Image, spec: ImageSpec) -> tuple[np.ndarray, Geometry]:
    """Return the feed of an image, (1, c, h, w) or (1, h, w, c) as `spec` says, and its place on the canvas."""
    if spec.fit == "letterbox":
        canvas, geometry = letterbox(image, spec.height, spec.width, spec.pad)
    else:
        ratio_x, ratio_y = spec.width / image.width, spec.height / image.height
        if spec.fit == "crop":
            ratio_x = ratio_y = max(ratio_x, ratio_y)
        new_width, new_height = round(image.width * ratio_x), round(image.height * ratio_y)
        refuse_enlarged(image, new_width, new_height)
        left, top = (spec.width - new_width) // 2, (spec.height - new_height) // 2
        box = (-left, -top, spec.width - left, spec.height - top)
        canvas = np.asarray(image.resize((new_width, new_height), Image.Resampling.BILINEAR).crop(box))
        geometry = Geometry(ratio_x=ratio_x, ratio_y=ratio_y, left=left, top=top)
    pixels = canvas.reshape(1, spec.height, spec.width, spec.channels)
    if spec.layout == "NCHW":
        pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    if spec.dtype == "uint8":
        return pixels, geometry
    shape = (1, -1, 1, 1) if spec.layout == "NCHW" else (1, 1, 1, -1)
    std = np.reshape(spec.std or (1.0,), shape)
    mean = np.reshape(spec.mean or (0.0,), shape)
    values = pixels.astype(np.float32) * np.float32(spec.scale / std) - np.float32(mean / std)
    return values.astype(spec.dtype, copy=False), geometry
