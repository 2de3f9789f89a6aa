"""Task-aligned assignment and the loss of an anchor-free detector with distributed box sides.

Sources: TOOD (task-aligned learning, https://arxiv.org/abs/2108.07755), generalized focal loss (distributed
box sides, https://arxiv.org/abs/2006.04388), CIoU (https://arxiv.org/abs/1911.08287).
Shapes in the docstrings: B batch, A anchors, M padded labels per image, K classes. Lengths are in pixels
unless a comment says strides.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor

from yolo11 import REG_MAX

__all__ = ["Assignment", "Loss", "assign", "ciou", "detection_loss"]

TOP_K = 10
SCORE_POWER, OVERLAP_POWER = 0.5, 6.0
BOX_GAIN, CLASS_GAIN, DFL_GAIN = 7.5, 0.5, 1.5
EPS = 1e-7


class Assignment(NamedTuple):
    """What every anchor should predict."""

    foreground: Tensor
    """(B, A) bool: the anchor belongs to a label."""
    boxes: Tensor
    """(B, A, 4) xyxy of that label."""
    scores: Tensor
    """(B, A, K) soft targets, 0 for background."""
    index: Tensor  # type: ignore[assignment]  # hides `tuple.index`, which nobody calls
    """(B, A) which of the M labels."""


class Loss(NamedTuple):
    """Of the detection branches."""

    total: Tensor
    parts: dict[str, float]
    """Box, class and distribution loss before their gains."""
    goal: Assignment


def ciou(a: Tensor, b: Tensor) -> Tensor:
    """Complete IoU of xyxy boxes, broadcast over the leading dimensions."""
    size_a, size_b = a[..., 2:] - a[..., :2], b[..., 2:] - b[..., :2]
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    iou = shared / (size_a.prod(-1) + size_b.prod(-1) - shared + EPS)
    hull = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    offset = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2
    distance = offset.square().sum(-1) / (hull.square().sum(-1) + EPS)
    angle_a = torch.atan(size_a[..., 0] / (size_a[..., 1] + EPS))
    angle_b = torch.atan(size_b[..., 0] / (size_b[..., 1] + EPS))
    shape = (4 / math.pi**2) * (angle_a - angle_b).square()
    with torch.no_grad():
        weight = shape / (shape - iou + 1 + EPS)
    return iou - distance - weight * shape


@torch.no_grad()
def assign(scores: Tensor, boxes: Tensor, centers: Tensor, labels: Tensor, targets: Tensor) -> Assignment:
    """Choose for every label the anchors that predict it best.

    Args:
        scores: (B, A, K) predicted probabilities.
        boxes: (B, A, 4) predicted xyxy.
        centers: (A, 2) anchor centres.
        labels: (B, M) classes, -1 for padding.
        targets: (B, M, 4) xyxy.
    """
    batch, anchors, classes = scores.shape
    real = labels >= 0  # (B, M)
    index = labels.clamp(min=0)
    margins = torch.cat((centers - targets[:, :, None, :2], targets[:, :, None, 2:] - centers), -1)
    inside = (margins.amin(-1) > 0) & real[:, :, None]  # (B, M, A)
    of_label = scores.transpose(1, 2).gather(1, index[:, :, None].expand(-1, -1, anchors))
    overlap = ciou(targets[:, :, None], boxes[:, None]).clamp(min=0) * inside
    align = of_label**SCORE_POWER * overlap**OVERLAP_POWER * inside

    best = align.topk(min(TOP_K, anchors), -1).indices
    chosen = torch.zeros_like(inside).scatter_(-1, best, True) & inside
    # an anchor wanted by several labels goes to the one that it overlaps most
    winner = F.one_hot(torch.where(chosen, overlap, -1.0).argmax(1), targets.shape[1]).transpose(1, 2).bool()
    chosen &= winner

    foreground = chosen.any(1)
    label_of = chosen.to(torch.uint8).argmax(1)  # (B, A)
    align = align * chosen
    scale = (overlap * chosen).amax(-1, keepdim=True) / (align.amax(-1, keepdim=True) + 1e-9)
    strength = (align * scale).amax(1) * foreground
    soft = F.one_hot(index.gather(1, label_of), classes) * strength[..., None]
    chosen_boxes = targets.gather(1, label_of[..., None].expand(batch, anchors, 4))
    return Assignment(foreground, chosen_boxes, soft, label_of)


def detection_loss(
    raw: tuple[Tensor, Tensor], anchors: Tensor, strides: Tensor, labels: Tensor, targets: Tensor
) -> Loss:
    """Loss of raw head outputs.

    Args:
        raw: (B, 4 * REG_MAX, A) box logits and (B, K, A) class logits.
        anchors: (1, 2, A) centres in strides.
        strides: (1, A).
        labels: (B, M) classes, -1 for padding.
        targets: (B, M, 4) xyxy.
    """
    sides = raw[0].transpose(1, 2).unflatten(-1, (4, REG_MAX))  # (B, A, 4, REG_MAX)
    logits = raw[1].transpose(1, 2)
    points, stride = anchors[0].T, strides[0][:, None]  # (A, 2) and (A, 1)
    reach = sides.softmax(-1) @ torch.arange(REG_MAX, dtype=sides.dtype)  # (B, A, 4) in strides
    boxes = torch.cat((points - reach[..., :2], points + reach[..., 2:]), -1) * stride
    goal = assign(logits.detach().sigmoid(), boxes.detach(), points * stride, labels, targets)

    total = goal.scores.sum().clamp(min=1)
    loss_class = F.binary_cross_entropy_with_logits(logits, goal.scores, reduction="sum") / total
    hit = goal.foreground
    weight = goal.scores.sum(-1)[hit]
    loss_box = ((1 - ciou(boxes[hit], goal.boxes[hit])) * weight).sum() / total
    in_strides = goal.boxes / stride
    wanted = torch.cat((points - in_strides[..., :2], in_strides[..., 2:] - points), -1)[hit]
    loss_dfl = (_distribution_loss(sides[hit], wanted) * weight).sum() / total
    loss = BOX_GAIN * loss_box + CLASS_GAIN * loss_class + DFL_GAIN * loss_dfl
    return Loss(loss, {"box": loss_box.item(), "class": loss_class.item(), "dfl": loss_dfl.item()}, goal)


def _distribution_loss(sides: Tensor, wanted: Tensor) -> Tensor:
    """(N, 4, REG_MAX) logits, (N, 4) distances in strides -> (N,) cross entropy with the two nearest bins."""
    wanted = wanted.clamp(0, REG_MAX - 1 - 0.01)
    low = wanted.long()
    share = wanted - low
    log_p = sides.log_softmax(-1)
    at_low = log_p.gather(-1, low[..., None]).squeeze(-1)
    at_high = log_p.gather(-1, low[..., None] + 1).squeeze(-1)
    return -((1 - share) * at_low + share * at_high).mean(-1)
