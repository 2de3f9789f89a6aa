"""The YOLO11 networks for detection and instance segmentation in plain PyTorch, written from their architecture.

Names of modules and parameters are those of the published checkpoints, so their state dicts load with
`strict=True` and exported graphs carry the usual node names (`/model.23/cv2.0/cv2.0.2/Conv`).
Shapes in the docstrings: B batch, C channels, H and W the size of a feature map, A anchors of all levels.

The network, with the width and depth of scale n:

    backbone  0 Conv/2  1 Conv/2  2 C3k2  3 Conv/2  4 C3k2 (P3)  5 Conv/2  6 C3k2 (P4)  7 Conv/2  8 C3k2
              9 SPPF  10 C2PSA (P5)
    neck      11 up  12 cat 6  13 C3k2  14 up  15 cat 4  16 C3k2 (out P3)  17 Conv/2  18 cat 13
              19 C3k2 (out P4)  20 Conv/2  21 cat 10  22 C3k2 (out P5)
    head      23 DetectHead or SegmentHead on 16, 19, 22
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitalloy.model.relevance import MASK_COEFFICIENTS
from bitalloy.zoo.networks.yolo11_blocks import C2PSA, SPPF, C3k2, Conv

__all__ = ["REG_MAX", "SCALES", "STRIDES", "Conv", "DetectHead", "Multipliers", "SegmentHead", "Yolo11", "fuse"]


class Multipliers(NamedTuple):
    """Multipliers of depth and width of one published size."""

    depth: float
    width: float
    max_channels: int


SCALES = {
    "n": Multipliers(0.50, 0.25, 1024),
    "s": Multipliers(0.50, 0.50, 1024),
    "m": Multipliers(0.50, 1.00, 512),
    "l": Multipliers(1.00, 1.00, 512),
    "x": Multipliers(1.00, 1.50, 512),
}
STRIDES = (8, 16, 32)
"""Pixels per cell on the levels P3, P4, P5."""
PROTOTYPE_CHANNELS = 256
"""Width of the layers before the prototypes, at width multiplier 1."""
REG_MAX = 16
"""Bins of the distribution over each box side's distance, in strides."""


class DFL(nn.Module):
    """Mean of a distribution over `REG_MAX` bins, as a fixed 1x1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(REG_MAX, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(REG_MAX, dtype=torch.float32).view(1, REG_MAX, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Turn logits (B, 4 * REG_MAX, A) into distances in strides, (B, 4, A)."""
        b, _, a = x.shape
        return self.conv(x.view(b, 4, REG_MAX, a).transpose(2, 1).softmax(1)).view(b, 4, a)


class DetectHead(nn.Module):
    """Box and class branches on three levels, decoded to pixels."""

    def __init__(self, classes: int, channels: tuple[int, int, int]) -> None:
        super().__init__()
        self.classes = classes
        box = max(16, channels[0] // 4, REG_MAX * 4)
        cls = max(channels[0], min(classes, 100))
        self.cv2 = nn.ModuleList(
            nn.Sequential(Conv(c, box, 3), Conv(box, box, 3), nn.Conv2d(box, 4 * REG_MAX, 1)) for c in channels
        )
        self.cv3 = nn.ModuleList(
            nn.Sequential(
                nn.Sequential(Conv(c, c, 3, groups=c), Conv(c, cls)),
                nn.Sequential(Conv(cls, cls, 3, groups=cls), Conv(cls, cls)),
                nn.Conv2d(cls, classes, 1),
            )
            for c in channels
        )
        self.dfl = DFL()
        self._cached: tuple[list[tuple[int, int]], Tensor, Tensor] | None = None

    def forward(self, levels: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
        """Turn three feature maps into raw (box logits, class logits) in training, else into decoded predictions."""
        parts = self.parts(levels)
        return parts if self.training else torch.cat(parts, 1)

    def parts(self, levels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return boxes and scores: logits in training, else (B, 4, A) pixels and (B, classes, A) probabilities."""
        b = levels[0].shape[0]
        boxes = torch.cat([f(x).view(b, 4 * REG_MAX, -1) for f, x in zip(self.cv2, levels, strict=True)], -1)
        scores = torch.cat([f(x).view(b, self.classes, -1) for f, x in zip(self.cv3, levels, strict=True)], -1)
        if self.training:
            return boxes, scores
        anchors, strides = self.anchors([(int(x.shape[2]), int(x.shape[3])) for x in levels])
        return self.decode(boxes, anchors) * strides, scores.sigmoid()

    def decode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Turn box logits (B, 4 * REG_MAX, A) into centre x, y, width, height in strides, (B, 4, A)."""
        near, far = self.dfl(boxes).chunk(2, 1)
        top_left, bottom_right = anchors - near, anchors + far
        return torch.cat(((top_left + bottom_right) / 2, bottom_right - top_left), 1)

    def anchors(self, sizes: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Return cell centres in strides (1, 2, A) and strides in pixels (1, A), from each level's (height, width)."""
        if self._cached is None or self._cached[0] != sizes:
            points, strides = [], []
            for stride, (h, w) in zip(STRIDES, sizes, strict=True):
                y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
                points.append(torch.stack((x, y)).view(2, -1))
                strides.append(torch.full((h * w,), float(stride)))
            self._cached = sizes, torch.cat(points, 1)[None], torch.cat(strides)[None]
        return self._cached[1], self._cached[2]

    def init_bias(self, image_size: int) -> None:
        """Initialize the biases for training: wide boxes, and few, equally likely objects per cell."""
        for stride, box, cls in zip(STRIDES, self.cv2, self.cv3, strict=True):
            assert isinstance(box, nn.Sequential) and isinstance(cls, nn.Sequential)
            nn.init.constant_(box[-1].bias, 1.0)  # type: ignore[arg-type]
            value = math.log(5 / self.classes / (image_size / stride) ** 2)
            nn.init.constant_(cls[-1].bias, value)  # type: ignore[arg-type]


class Proto(nn.Module):
    """Mask prototypes at twice the resolution of P3: upsampling is learned."""

    def __init__(self, c1: int, hidden: int) -> None:
        super().__init__()
        self.cv1 = Conv(c1, hidden, 3)
        self.upsample = nn.ConvTranspose2d(hidden, hidden, 2, 2)
        self.cv2 = Conv(hidden, hidden, 3)
        self.cv3 = Conv(hidden, MASK_COEFFICIENTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(self.cv2(self.upsample(self.cv1(x))))


class SegmentHead(DetectHead):
    """Detection, and for every anchor the coefficients that combine the prototypes to its mask."""

    def __init__(self, classes: int, channels: tuple[int, int, int], prototype_channels: int) -> None:
        super().__init__(classes, channels)
        hidden = max(channels[0] // 4, MASK_COEFFICIENTS)
        self.proto = Proto(channels[0], prototype_channels)
        self.cv4 = nn.ModuleList(
            nn.Sequential(Conv(c, hidden, 3), Conv(hidden, hidden, 3), nn.Conv2d(hidden, MASK_COEFFICIENTS, 1))
            for c in channels
        )

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, ...]:
        """Turn three feature maps into boxes, scores and coefficients, joined to one tensor, and prototypes.

        In training mode: box logits, class logits, (B, 32, A) coefficients, (B, 32, H/4, W/4) prototypes.
        """
        b = levels[0].shape[0]
        found = [f(x).view(b, MASK_COEFFICIENTS, -1) for f, x in zip(self.cv4, levels, strict=True)]
        coefficients, prototypes = torch.cat(found, -1), self.proto(levels[0])
        boxes, scores = self.parts(levels)
        if self.training:
            return boxes, scores, coefficients, prototypes
        return torch.cat((boxes, scores, coefficients), 1), prototypes


class Concat(nn.Module):
    """Joins feature maps along the channels."""

    def forward(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, 1)


class Yolo11(nn.Module):
    """(B, 3, H, W) RGB in 0..1, H and W multiples of 32 -> (B, 4 + classes, A).

    The first four rows are centre x, centre y, width, height in pixels, the others sigmoid scores.
    With `masks` there are 32 more rows of coefficients, and a second output (B, 32, H/4, W/4) of prototypes.
    In training mode the raw logits of `DetectHead` or `SegmentHead` are returned.
    """

    def __init__(self, classes: int = 80, *, scale: str = "n", masks: bool = False) -> None:
        super().__init__()
        depth, width, limit = SCALES[scale]
        deep = scale in "mlx"  # the larger sizes use C3k blocks everywhere

        def ch(c: int) -> int:
            return math.ceil(min(c, limit) * width / 8) * 8

        n = max(round(2 * depth), 1)
        c64, c128, c256, c512, c1024 = (ch(c) for c in (64, 128, 256, 512, 1024))
        levels = (c256, c512, c1024)
        self.model = nn.Sequential(
            Conv(3, c64, 3, 2),
            Conv(c64, c128, 3, 2),
            C3k2(c128, c256, n, c3k=deep, expansion=0.25),
            Conv(c256, c256, 3, 2),
            C3k2(c256, c512, n, c3k=deep, expansion=0.25),
            Conv(c512, c512, 3, 2),
            C3k2(c512, c512, n, c3k=True),
            Conv(c512, c1024, 3, 2),
            C3k2(c1024, c1024, n, c3k=True),
            SPPF(c1024, c1024),
            C2PSA(c1024, n),
            nn.Upsample(scale_factor=2.0, mode="nearest"),
            Concat(),
            C3k2(c1024 + c512, c512, n, c3k=deep),
            nn.Upsample(scale_factor=2.0, mode="nearest"),
            Concat(),
            C3k2(c512 + c512, c256, n, c3k=deep),
            Conv(c256, c256, 3, 2),
            Concat(),
            C3k2(c256 + c512, c512, n, c3k=deep),
            Conv(c512, c512, 3, 2),
            Concat(),
            C3k2(c512 + c1024, c1024, n, c3k=True),
            SegmentHead(classes, levels, ch(PROTOTYPE_CHANNELS)) if masks else DetectHead(classes, levels),
        )

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        m, seen = self.model, {}
        for i in range(11):
            seen[i] = x = m[i](x)
        for i, other in ((12, 6), (15, 4), (18, 13), (21, 10)):
            x = m[i + 1](m[i]([m[i - 1](x), seen[other]]))
            seen[i + 1] = x
        return m[23]([seen[16], seen[19], seen[22]])


def fuse(model: nn.Module) -> nn.Module:
    """Fold every batch normalisation into its convolution, in place; the model must be in eval mode."""
    for module in model.modules():
        if isinstance(module, Conv) and isinstance(module.bn, nn.BatchNorm2d):
            module.conv = nn.utils.fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()  # type: ignore[assignment]
    return model
