"""Train YOLO11n on the generated sample `shapes` from scratch on a CPU and write the package's ONNX file.

    python reference/train_detector.py --work /tmp/detector

The images are drawn on the fly and never repeat, so there is no augmentation. Training starts on small
images and ends at 320 pixels. `--work` receives `checkpoint.pt` every few minutes; the same command goes on
from it. At the end, or at once with `--export-only`, the averaged weights are exported and the *exported
file* is measured.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from bitalloy.samples import shapes
from detection_loss import detection_loss
from detector_file import evaluate, export
from yolo11 import STRIDES, Yolo11

STAGES = ((192, 500), (256, 300), (320, 300))
"""(image side in pixels, steps) one after the other."""
BATCH = 16
LEARNING_RATE, FINAL_RATE = 2e-3, 2e-5
WARM_UP = 100
WEIGHT_DECAY = 5e-4
AVERAGING = 0.998
"""Decay per step of the moving average of the weights."""
CHECKPOINT_EVERY = 100
IMAGE_SIZE = 320
OUTPUT = Path(__file__).resolve().parents[1] / "src" / "bitalloy" / "samples" / "yolo11n-shapes.onnx"

Batch = tuple[Tensor, Tensor, Tensor]
"""(B, 3, H, W) uint8 images, (B, M) labels padded with -1, (B, M, 4) xyxy boxes in pixels."""


class Batches(IterableDataset[Batch]):
    """Endless batches of training scenes, from a given step on."""

    def __init__(self, *, seed: int, start: int, stages: tuple[tuple[int, int], ...]) -> None:
        self.seed, self.start, self.stages = seed, start, stages

    def __iter__(self) -> Iterator[Batch]:
        sizes = [size for size, steps in self.stages for _ in range(steps)]
        for step, size in enumerate(sizes[self.start :], self.start):
            indices = range(step * BATCH, (step + 1) * BATCH)
            yield collate([shapes.scene(i, seed=self.seed, size=size, split="train") for i in indices])


def collate(scenes: list[shapes.Scene]) -> Batch:
    """Stack scenes, with the labels padded to the longest list."""
    most = max(1, *(len(s.labels) for s in scenes))
    images = torch.stack([torch.from_numpy(s.image).permute(2, 0, 1) for s in scenes])
    labels = torch.full((len(scenes), most), -1, dtype=torch.int64)
    boxes = torch.zeros(len(scenes), most, 4)
    for i, s in enumerate(scenes):
        labels[i, : len(s.labels)] = torch.from_numpy(s.labels)
        boxes[i, : len(s.labels)] = torch.from_numpy(s.boxes())
    return images, labels, boxes


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine."""
    if step < WARM_UP:
        return LEARNING_RATE * (step + 1) / WARM_UP
    done = (step - WARM_UP) / max(1, steps - WARM_UP)
    return FINAL_RATE + (LEARNING_RATE - FINAL_RATE) * (1 + math.cos(math.pi * done)) / 2


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW, with weight decay on convolution weights only."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int) -> None:
    """Move the averaged weights and statistics towards the current ones; fast in the first steps."""
    decay = AVERAGING * (1 - math.exp(-(step + 1) / 300))
    for old, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if old.dtype.is_floating_point:
            old.lerp_(new, 1 - decay)


def save(path: Path, state: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def train(work: Path, *, seed: int, stages: tuple[tuple[int, int], ...]) -> Path:
    """Train to the end of the last stage, from the checkpoint in `work` if there is one; returns its path."""
    torch.manual_seed(seed)
    path = work / "checkpoint.pt"
    model = Yolo11(len(shapes.CLASSES)).train()
    head: Any = model.model[-1]
    head.init_bias(IMAGE_SIZE)
    average, optimizer, first, spent = copy.deepcopy(model), optimizer_for(model), 0, 0.0
    history: list[str] = []
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent, history = state["step"], state["seconds"], state["history"]
    model.to(memory_format=torch.channels_last)
    steps = sum(count for _, count in stages)
    schedule = ",".join(f"{side}:{count}" for side, count in stages)
    batches = Batches(seed=seed, start=first, stages=stages)
    loader = DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=8)
    started, sums = time.perf_counter() - spent, torch.zeros(3)
    for step, (images, labels, boxes) in enumerate(loader, first):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        raw = model(images.to(torch.float32, memory_format=torch.channels_last) / 255)
        side = images.shape[-1]
        anchors, strides = head.anchors([(side // s, side // s) for s in STRIDES])
        loss, parts = detection_loss(raw, anchors, strides, labels, boxes)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        update_average(average, model, step)
        sums += torch.tensor(parts)
        done, seconds = step + 1, time.perf_counter() - started
        if done % 50 == 0:
            box, cls, dfl = (sums / 50).tolist()
            sums.zero_()
            losses = f"box {box:.3f} class {cls:.3f} dfl {dfl:.3f}"
            print(f"{done}/{steps} {seconds:.0f}s {side}px {losses}", flush=True)
        if done % CHECKPOINT_EVERY == 0 or done == steps:
            state = {"step": done, "images": done * BATCH, "seconds": seconds, "seed": seed}
            state |= {"model": model.state_dict(), "average": average.state_dict()}
            state["history"] = [*history, f"--seed {seed} --stages {schedule} (steps {first} to {done})"]
            save(path, state | {"optimizer": optimizer.state_dict()})
    return path


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--work", type=Path, required=True, help="for the checkpoint and validation images")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="ONNX file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    default = ",".join(f"{side}:{steps}" for side, steps in STAGES)
    parser.add_argument("--stages", default=default, help="SIDE:STEPS,... (default: %(default)s)")
    parser.add_argument("--export-only", action="store_true", help="export and measure the checkpoint as it is")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    pairs = (part.split(":") for part in args.stages.split(","))
    stages = tuple((int(side), int(steps)) for side, steps in pairs)
    path = args.work / "checkpoint.pt"
    if not args.export_only:
        path = train(args.work, seed=args.seed, stages=stages)
    state = torch.load(path, weights_only=True)
    model = Yolo11(len(shapes.CLASSES))
    model.load_state_dict(state["average"])
    command = "python reference/train_detector.py " + ", then ".join(state["history"])
    export(model, args.output, command=command, images=state["images"], seed=state["seed"])
    scores = evaluate(args.output, args.work / "val", count=200)
    record = {"file": args.output.name, "bytes": args.output.stat().st_size, "images": state["images"]}
    print(f"AP50-95 {scores['ap']:.4f}  AP50 {scores['ap50']:.4f}", file=sys.stderr)
    print(json.dumps(record | {"seconds": round(state["seconds"]), "seed": state["seed"]} | scores))


if __name__ == "__main__":
    main()
