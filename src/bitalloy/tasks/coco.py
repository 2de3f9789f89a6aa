"""Labels in COCO format: boxes, masks and the images they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image

from bitalloy.core.encoding import from_json
from bitalloy.core.errors import DataError
from bitalloy.core.paths import path_inside
from bitalloy.data import masks
from bitalloy.data.datasets import list_files
from bitalloy.data.images import IMAGE_SUFFIXES, file_hash, open_image

__all__ = ["Category", "CocoLabels", "LabelledBox", "LabelledImage", "find_images", "read_coco", "without_labels"]


class LabelledImage(msgspec.Struct, frozen=True, kw_only=True):
    """An image of an annotation file."""

    id: int
    file_name: str
    width: int | None = None
    height: int | None = None


class LabelledBox(msgspec.Struct, frozen=True, kw_only=True):
    """An object of an annotation file."""

    id: int | None = None
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    """Box of the object: left, top, width, height in pixels."""
    iscrowd: int | bool = 0
    segmentation: msgspec.Raw = msgspec.Raw(b"null")
    """Mask of the object as JSON, read by `CocoLabels.mask`; a detection file may have none."""
    point: tuple[float, float] | None = None
    """Point prompt x, y inside the object, which only the embedded sample has, and not COCO."""


class Category(msgspec.Struct, frozen=True, kw_only=True):
    """A class of an annotation file."""

    id: int
    name: str


class _File(msgspec.Struct, frozen=True, kw_only=True):
    images: tuple[LabelledImage, ...]
    annotations: tuple[LabelledBox, ...]
    categories: tuple[Category, ...]


@dataclass(frozen=True, slots=True)
class CocoLabels:
    """A checked annotation file and the images that it lists."""

    path: Path
    folder: Path
    """Folder of the images."""
    images: tuple[LabelledImage, ...]
    """Images in the order of their ids."""
    boxes: tuple[LabelledBox, ...]
    categories: tuple[Category, ...]
    """Categories in the order of their ids."""

    def objects(self) -> dict[int, list[LabelledBox]]:
        """Return image id -> its objects, in the order of the file; an image without any has an empty list."""
        found: dict[int, list[LabelledBox]] = {image.id: [] for image in self.images}
        for box in self.boxes:
            found[box.image_id].append(box)
        return found

    def has_masks(self) -> bool:
        """Return whether any object has a mask."""
        return any(bytes(box.segmentation) not in (b"null", b"[]") for box in self.boxes)

    def open_image(self, entry: LabelledImage, channels: int = 3) -> Image.Image:
        """Read an image of the file.

        Raises:
            DataError: the image is damaged, or its size is not the one that the annotation file says.
        """
        opened = open_image(self.file_of(entry), channels)
        if (entry.width or opened.width, entry.height or opened.height) != opened.size:
            raise DataError(
                f"'{entry.file_name}' is {opened.width}x{opened.height}, but '{self.path}' says "
                f"{entry.width}x{entry.height}. The labels belong to other images."
            )
        return opened

    def mask(self, box: LabelledBox, size: tuple[int, int]) -> masks.Rle:
        """Return the mask of an object on its image of `size` (width, height).

        Raises:
            DataError: the object has no mask, or a broken one.
        """
        try:
            return masks.from_coco(bytes(box.segmentation), size[1], size[0])
        except ValueError as error:
            raise DataError(
                f"Annotation {box.id} of '{self.path}' (image {box.image_id}) has no usable mask: {error}. "
                "Repair `segmentation`, or take the annotation out."
            ) from error

    @property
    def labelled(self) -> bool:
        """Whether there are labels at all, and not images only."""
        return bool(self.categories)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the annotation file; empty where there are images only."""
        return file_hash(self.path) if self.labelled else ""

    def file_of(self, entry: LabelledImage) -> Path:
        """Return the path of an image."""
        return self.folder / entry.file_name

    def category_ids(self, classes: int, names: Sequence[str] | None) -> np.ndarray:
        """Return the category id per class index of the model, -1 for a class that the labels do not know.

        1. By name, where the model's class names are known and hold every category.
        2. By order of id, where there are as many categories as classes (80 in COCO, whose ids run to 90).

        Images without labels know no class.

        Raises:
            DataError: neither rule applies.
        """
        if not self.labelled:
            return np.full(classes, -1)
        known = {category.name: category.id for category in self.categories}
        if names is not None and len(names) == classes and known.keys() <= set(names):
            return np.array([known.get(name, -1) for name in names])
        if len(self.categories) == classes:
            return np.array([category.id for category in self.categories])
        hint = "has no class names in its metadata" if names is None else f"calls its classes {list(names)[:5]}..."
        raise DataError(
            f"The model has {classes} classes and {hint}, but '{self.path}' has {len(self.categories)} categories "
            f"({[c.name for c in self.categories][:5]}...). Evaluate with the labels of the model's own classes."
        )


def read_coco(annotations: Path, images: Path | None = None) -> CocoLabels:
    """Read an annotation file in COCO format and find its images.

    Args:
        annotations: annotation file, e.g. `instances_val2017.json`.
        images: folder of the images; by default `find_images` looks for it.

    Raises:
        DataError: the file is missing, broken or contradicts itself, or images that it lists are missing.
    """
    try:
        content = from_json(annotations.read_bytes(), _File)
    except OSError as error:
        raise DataError(
            f"Cannot read the labels '{annotations}': {error.strerror}. Give a COCO annotation file."
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"'{annotations}' is no COCO annotation file: {error}. Give one with bounding boxes."
        ) from error
    _check_references(annotations, content)
    return CocoLabels(
        path=annotations,
        folder=find_images(annotations, [i.file_name for i in content.images], images),
        images=tuple(sorted(content.images, key=lambda i: i.id)),
        boxes=content.annotations,
        categories=tuple(sorted(content.categories, key=lambda c: c.id)),
    )


def without_labels(folder: Path) -> CocoLabels:
    """List the images of a folder as if in an annotation file without annotations or categories.

    Raises:
        DataError: the folder has no images.
    """
    files = list_files(folder, IMAGE_SUFFIXES)
    if not files:
        raise DataError(f"No images in '{folder}'. Give a folder of images, or a COCO annotation file.")
    images = tuple(LabelledImage(id=i, file_name=f.relative_to(folder).as_posix()) for i, f in enumerate(files))
    return CocoLabels(path=folder, folder=folder, images=images, boxes=(), categories=())


def _check_references(path: Path, content: _File) -> None:
    images, categories = {i.id for i in content.images}, {c.id for c in content.categories}
    if not content.images or not content.categories:
        raise DataError(f"'{path}' lists {len(images)} images and {len(categories)} categories; both are needed.")
    if len(images) < len(content.images) or len(categories) < len(content.categories):
        raise DataError(f"'{path}' uses an image id or a category id twice. Make the ids unique.")
    for box in content.annotations:
        if box.image_id not in images or box.category_id not in categories:
            raise DataError(
                f"'{path}' has a box for image {box.image_id} and category {box.category_id}, "
                "at least one of which it does not list. Repair the file."
            )


def find_images(path: Path, names: Sequence[str], images: Path | None = None) -> Path:
    """Find the folder that holds the images which a label file lists.

    1. `images` beside the file, or the file's own folder.
    2. COCO's own layout: for `annotations/instances_val2017.json`, `val2017` beside `annotations`, or `images/val2017`
       there.

    Args:
        path: path of the label file.
        names: file names of the images.
        images: the only folder to look in; None for the usual ones.

    Raises:
        DataError: images are missing.
    """
    above, split = path.parent.parent, path.stem.rpartition("_")[2]
    usual = [path.parent / "images", path.parent, above / split, above / "images" / split]
    folders = [images] if images is not None else usual
    what = f"'{path}' lists the image"
    for folder in folders:
        paths = (path_inside(folder, name, what, DataError) for name in names)
        missing = [name for name, path in zip(names, paths, strict=True) if not path.is_file()]
        if not missing:
            return folder
        if len(missing) < len(names):
            raise DataError(
                f"{len(missing)} of {len(names)} images that '{path}' lists are missing in '{folder}', "
                f"the first is '{missing[0]}'. Add them, or take them out of the annotation file."
            )
    raise DataError(
        f"None of the {len(names)} images that '{path}' lists, such as '{names[0]}', lies in "
        f"{' or '.join(repr(str(f)) for f in folders)}. Name the folder that holds them."
    )
