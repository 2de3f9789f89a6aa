"""What the training scripts share: endless generated batches, the training loop and its checkpoint.

The images are drawn on the fly and never repeat, so there is no augmentation. Shapes in the docstrings: B images,
M padded instances per image, H and W pixels.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from bitalloy.samples import shapes

__all__ = ["Batch", "Recipe", "Stages", "checkpoint", "collate", "main", "train"]

BATCH = 16
WARM_UP = 100
"""Steps over which the learning rate rises."""
WEIGHT_DECAY = 5e-4
AVERAGING = 0.998
"""Decay per step of the moving average of the weights."""
CHECKPOINT_EVERY = 50
REPORT_EVERY = 25

Stages = tuple[tuple[int, int], ...]
"""(image side in pixels, steps) one after the other."""


class Batch(NamedTuple):
    """Generated scenes."""

    images: Tensor
    """(B, 3, H, W) uint8."""
    labels: Tensor
    """(B, M) classes, -1 for padding."""
    colors: Tensor
    """(B, M) colours, -1 for padding."""
    boxes: Tensor
    """(B, M, 4) xyxy in pixels."""
    instances: Tensor
    """(B, H, W) uint8: 0 is background, i + 1 is instance i."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What one script trains, and how."""

    build: Callable[[], nn.Module]
    """The network as it is before the first step."""
    loss: Callable[[nn.Module, Batch, float], tuple[Tensor, dict[str, float]]]
    """(network, batch, part of all steps that is done) -> loss, and its parts by name."""
    stages: Stages
    learning_rate: float
    final_rate: float
    rate_of: Callable[[str], float] = lambda _: 1.0
    """Parameter name -> what its learning rate is multiplied by."""
    orthogonal: Callable[[str], bool] = lambda _: False
    """Parameter name -> whether it is a matrix whose steps Muon makes orthogonal; AdamW changes all others."""
    history: Callable[[], list[str]] = list
    """What was done to the weights before the first step, as options of the script."""
    bfloat16: bool = False
    """Whether convolutions and matrix products compute in bfloat16."""


class Batches(IterableDataset[Batch]):
    """Endless batches of training scenes, from a given step on."""

    def __init__(self, *, seed: int, start: int, stages: Stages) -> None:
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
    colors = labels.clone()
    boxes = torch.zeros(len(scenes), most, 4)
    for i, s in enumerate(scenes):
        labels[i, : len(s.labels)] = torch.from_numpy(s.labels)
        colors[i, : len(s.labels)] = torch.from_numpy(s.colors)
        boxes[i, : len(s.labels)] = torch.from_numpy(s.boxes())
    return Batch(images, labels, colors, boxes, torch.from_numpy(np.stack([s.instance_map for s in scenes])))


def rate(step: int, steps: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine."""
    if step < WARM_UP:
        return recipe.learning_rate * (step + 1) / WARM_UP
    done = (step - WARM_UP) / max(1, steps - WARM_UP)
    return recipe.final_rate + (recipe.learning_rate - recipe.final_rate) * (1 + math.cos(math.pi * done)) / 2


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal, in float32; each has the root mean square of a step of AdamW.

    Keller Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), with the scale of
    https://arxiv.org/abs/2502.16982, equation 4. `torch.optim.Muon` computes in bfloat16, which takes seconds a step on
    a CPU without instructions for it.
    """

    def __init__(self, params: list[dict[str, Any]], lr: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change each matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                slow = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                slow.lerp_(matrix.grad, 1 - group["momentum"])
                step = orthogonalised(torch.lerp(matrix.grad, slow, group["momentum"]))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.sub_(step, alpha=group["lr"] * 0.2 * math.sqrt(max(matrix.shape)))


def orthogonalised(matrix: Tensor) -> Tensor:
    """About U V^T of a matrix U S V^T, by five steps of a quintic Newton-Schulz iteration."""
    wide = matrix.T if len(matrix) > matrix.shape[1] else matrix
    found = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        square = found @ found.T
        found = 3.4445 * found + (-4.775 * square + 2.0315 * square @ square) @ found
    return found.T if wide is not matrix else found


class Pair:
    """Two optimizers of different parameters as one."""

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> None:
        self.parts = (first, second)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def optimizer_for(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer | Pair:
    """AdamW, with weight decay on weights of convolutions and matrices only; and Muon, where the recipe has it."""
    groups: tuple[dict[tuple[float, float], list[nn.Parameter]], ...] = ({}, {})
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = WEIGHT_DECAY if parameter.ndim > 1 else 0.0
            found = groups[recipe.orthogonal(name)].setdefault((decay, recipe.rate_of(name)), [])
            found.append(parameter)
    plain, orthogonal = (
        [{"params": found, "weight_decay": decay, "scale": scale} for (decay, scale), found in by.items()]
        for by in groups
    )
    adam = torch.optim.AdamW(plain, lr=recipe.learning_rate)
    if not orthogonal:
        return adam
    return Pair(adam, Muon(orthogonal, lr=recipe.learning_rate))


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


def checkpoint(work: Path) -> Path:
    """Where a work folder keeps the state of the training."""
    return work / "checkpoint.pt"


def train(recipe: Recipe, work: Path, *, seed: int, stages: Stages) -> None:
    """Train to the end of the last stage, from the checkpoint in `work` if there is one."""
    torch.manual_seed(seed)
    path = checkpoint(work)
    model = recipe.build().train()
    average, optimizer, first, spent = copy.deepcopy(model), optimizer_for(model, recipe), 0, 0.0
    history = recipe.history()
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent, history = state["step"], state["seconds"], state["history"]
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = sum(count for _, count in stages)
    schedule = ",".join(f"{side}:{count}" for side, count in stages)
    loader = DataLoader(
        Batches(seed=seed, start=first, stages=stages), batch_size=None, num_workers=1, prefetch_factor=8
    )
    started, sums = time.perf_counter() - spent, dict[str, float]()
    for step, batch in enumerate(loader, first):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, recipe) * group["scale"]
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
            loss, parts = recipe.loss(model, batch, step / steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        update_average(average, model, step)
        sums = {name: sums.get(name, 0.0) + value for name, value in parts.items()}
        done, seconds = step + 1, time.perf_counter() - started
        if done % REPORT_EVERY == 0:
            losses = " ".join(f"{name} {value / REPORT_EVERY:.3f}" for name, value in sums.items())
            sums.clear()
            print(f"{done}/{steps} {seconds:.0f}s {batch.images.shape[-1]}px {losses}", flush=True)
        if done % CHECKPOINT_EVERY == 0 or done == steps:
            state = {"step": done, "images": done * BATCH, "seconds": seconds, "seed": seed}
            state |= {"model": model.state_dict(), "average": average.state_dict()}
            state["history"] = [*history, f"--seed {seed} --stages {schedule} (steps {first} to {done})"]
            save(path, state | {"optimizer": optimizer.state_dict()})


def main(
    doc: str | None,
    recipe: Recipe,
    output: Path,
    finish: Callable[[dict[str, Any], Path, Path], dict[str, Any]],
) -> None:
    """The command line of a training script.

    Args:
        doc: the script's docstring.
        recipe: what it trains.
        output: the ONNX file that it writes by default.
        finish: (checkpoint, file to write, work folder) -> scores of the written file.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="for the checkpoint and validation images")
    parser.add_argument("--output", type=Path, default=output, help="ONNX file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    default = ",".join(f"{side}:{steps}" for side, steps in recipe.stages)
    parser.add_argument("--stages", default=default, help="SIDE:STEPS,... (default: %(default)s)")
    parser.add_argument("--float32", action="store_true", help="no bfloat16: faster on CPUs without it")
    parser.add_argument("--export-only", action="store_true", help="export and measure the checkpoint as it is")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    pairs = (part.split(":") for part in args.stages.split(","))
    if args.float32:
        recipe = replace(recipe, bfloat16=False)
    if not args.export_only:
        train(recipe, args.work, seed=args.seed, stages=tuple((int(side), int(steps)) for side, steps in pairs))
    state = torch.load(checkpoint(args.work), weights_only=True)
    state["command"] = f"python reference/{Path(sys.argv[0]).name} " + ", then ".join(state["history"])
    scores = finish(state, args.output, args.work)
    record = {"file": args.output.name, "bytes": args.output.stat().st_size, "images": state["images"]}
    print(json.dumps(record | {"seconds": round(state["seconds"]), "seed": state["seed"]} | scores))
