"""The embedded sample `shapes`: coloured geometric shapes on textured backgrounds, with exact labels.

The record of a scene is the map of instance ids with the class and colour of each instance; boxes, masks,
semantic maps, prompts, captions and questions all follow from it. A scene depends on (split, seed, index, size) alone:
no global state, any order, any subset. Bits are equal for equal versions of numpy and Pillow; a change
of the generator raises `VERSION`. How a scene is drawn: `bitalloy.samples.drawing`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from bitalloy.core.errors import DataError, RunDirectoryError
from bitalloy.core.ownership import make_temporary
from bitalloy.data.masks import interior_point, run_lengths
from bitalloy.samples import words
from bitalloy.samples.drawing import CLASSES, COLORS, draw

__all__ = ["CLASSES", "COLORS", "SPLITS", "VERSION", "Scene", "scene", "write_coco"]

VERSION = 1
"""Version of the generator, raised whenever the same arguments would give another scene."""
_LAYOUT = 2
"""Raised whenever `write_coco` writes other files for the same scenes."""
SPLITS: tuple[str, ...] = ("train", "val", "test", "calibration")
"""Names of the splits, streams of scenes that share no random numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One generated image and everything that is known about it; n is the number of instances."""

    image: npt.NDArray[np.uint8]
    """RGB image, (H, W, 3)."""
    labels: npt.NDArray[np.int64]
    """Indices into `CLASSES`, (n,); entry i belongs to id i + 1 of the instance map."""
    colors: npt.NDArray[np.int64]
    """Indices into `COLORS`, (n,)."""
    instance_map: npt.NDArray[np.uint8]
    """Map of instances, (H, W): 0 is background, i + 1 is instance i; a higher id lies in front of a lower one."""

    def masks(self) -> npt.NDArray[np.bool_]:
        """Return the masks of the visible pixels of each instance, (n, H, W)."""
        ids = np.arange(1, len(self.labels) + 1, dtype=np.uint8)
        return np.equal(self.instance_map[None], ids[:, None, None])

    def areas(self) -> npt.NDArray[np.int64]:
        """Return the number of visible pixels of each instance, (n,)."""
        return np.bincount(self.instance_map.ravel(), minlength=len(self.labels) + 1)[1:].astype(np.int64)

    def boxes(self) -> npt.NDArray[np.float32]:
        """Return x1, y1, x2, y2 around the visible pixels, (n, 4); x2 and y2 lie one past the last pixel."""
        out = np.zeros((len(self.labels), 4), np.float32)
        for row, mask in zip(out, self.masks(), strict=True):
            columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
            row[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        return out

    def semantic(self) -> npt.NDArray[np.uint8]:
        """Return the semantic map, (H, W): 0 is background, label + 1 elsewhere."""
        table = np.concatenate([[0], self.labels + 1]).astype(np.uint8)
        return table[self.instance_map]

    def points(self) -> npt.NDArray[np.float32]:
        """Return x, y of a point prompt for each instance, deep inside its visible pixels, (n, 2)."""
        found = [interior_point(mask) for mask in self.masks()]
        return np.array(found, np.float32).reshape(-1, 2)

    def caption(self) -> str:
        """Return one sentence that names and counts every shape."""
        return words.caption(self.labels.tolist(), self.colors.tolist())

    def questions(self) -> list[dict[str, Any]]:
        """Return questions with answers: yes or no, a number, multiple choice; see `words.questions`."""
        return words.questions(self.labels.tolist(), self.colors.tolist())


def scene(index: int, *, seed: int = 0, size: int = 320, split: str = "val") -> Scene:
    """Draw one scene.

    Args:
        index: number of the scene in its split, from 0; there is no last one.
        seed: chooses another endless stream.
        size: side of the square image, in pixels.
        split: one of `SPLITS`.

    Raises:
        DataError: the split is unknown, a number is negative, or the size is below 32.
    """
    if split not in SPLITS:
        raise DataError(f"Unknown split '{split}' of shapes. Use one of: {', '.join(SPLITS)}.")
    if index < 0 or seed < 0:
        raise DataError(f"A shapes scene needs index and seed from 0, got index {index} and seed {seed}.")
    if size < 32:
        raise DataError(f"A shapes scene needs a size of at least 32 pixels, got {size}.")
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([SPLITS.index(split), seed, index])))
    drawing = draw(rng, size)
    return Scene(
        image=drawing.image,
        labels=np.asarray(drawing.labels, np.int64),
        colors=np.asarray(drawing.colors, np.int64),
        instance_map=drawing.instance_map,
    )


def write_coco(folder: str | Path, *, count: int, seed: int = 0, size: int = 320, split: str = "val") -> Path:
    """Write scenes 0..count-1 as `images/000000.png`... with labels for all tasks.

    1. `instances.json` in COCO format: boxes, masks, and a `point` inside each object as a prompt. Category ids are
       label + 1, image ids index + 1.
    2. `annotations/000000.png`...: semantic maps as in ADE20K, where 0 would mean unlabelled and does not occur: 1 is
       background, label + 2 elsewhere.
    3. `captions.json` in COCO format.
    4. `questions.jsonl`, one JSON object a line.

    The folder appears complete or not at all; one that already holds the same data is left as it is.

    Returns:
        The folder.

    Raises:
        DataError: the folder exists and holds something else, or `scene` refuses the arguments.
        RunDirectoryError: the folder cannot be written, such as on a full disk.
    """
    folder = Path(folder)
    info: dict[str, Any] = {"description": "shapes", "version": str(VERSION), "split": split}
    info |= {"layout": _LAYOUT, "seed": seed, "size": size, "count": count}
    if _holds(folder, info):
        return folder
    try:
        _place(folder, info)
    except OSError as error:
        raise RunDirectoryError(
            f"The sample '{folder}' cannot be written: {error}. Free space or choose another folder."
        ) from error
    return folder


def _place(folder: Path, info: dict[str, Any]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = make_temporary(folder.parent)
    try:
        _write(work, info)
        work.chmod(0o755)
        try:
            work.rename(folder)
        except OSError:  # another process may have been faster
            if not _holds(folder, info):
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _holds(folder: Path, info: dict[str, Any]) -> bool:
    """True if the folder has this very data, False if it is absent or empty."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    remedy = "Choose another folder or remove it."
    try:
        found = json.loads((folder / "instances.json").read_text(encoding="utf-8"))["info"]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise DataError(f"'{folder}' exists and is no shapes data set. {remedy}") from exc
    if found != info:
        raise DataError(f"'{folder}' holds other data ({found}), wanted {info}. {remedy}")
    return True


def _write(folder: Path, info: dict[str, Any]) -> None:
    for part in ("images", "annotations"):
        (folder / part).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    questions: list[str] = []
    for index in range(info["count"]):
        drawn = scene(index, seed=info["seed"], size=info["size"], split=info["split"])
        name = f"{index:06d}.png"
        Image.fromarray(drawn.image).save(folder / "images" / name, compress_level=1)
        Image.fromarray(drawn.semantic() + np.uint8(1)).save(folder / "annotations" / name, compress_level=1)
        images.append({"id": index + 1, "file_name": name, "width": info["size"], "height": info["size"]})
        annotations += _annotations(drawn, image_id=index + 1, first_id=len(annotations) + 1)
        captions.append({"id": index + 1, "image_id": index + 1, "caption": drawn.caption()})
        questions += [json.dumps({"image": name, **question}) for question in drawn.questions()]
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    common = {"info": info, "images": images}
    contents = {
        "instances.json": json.dumps(common | {"annotations": annotations, "categories": categories}),
        "captions.json": json.dumps(common | {"annotations": captions}),
        "questions.jsonl": "\n".join([*questions, ""]),
    }
    for name, text in contents.items():
        (folder / name).write_text(text, encoding="utf-8")


def _annotations(drawn: Scene, *, image_id: int, first_id: int) -> list[dict[str, Any]]:
    masks, areas = drawn.masks(), drawn.areas().tolist()
    rows = zip(drawn.labels.tolist(), drawn.boxes().tolist(), drawn.points().tolist(), strict=True)
    return [
        {
            "id": first_id + i,
            "image_id": image_id,
            "category_id": label + 1,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": areas[i],
            "iscrowd": 0,
            "segmentation": run_lengths(masks[i]),
            "point": point,
        }
        for i, (label, (x1, y1, x2, y2), point) in enumerate(rows)
    ]
