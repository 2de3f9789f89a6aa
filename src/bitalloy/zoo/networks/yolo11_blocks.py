"""Building blocks of the YOLO11 networks: convolutions, residual blocks, pooling and attention.

Shapes in the docstrings are named as in `networks.yolo11`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Attention", "Bottleneck", "C2PSA", "C3k", "C3k2", "Conv", "PSABlock", "SPPF"]


class Conv(nn.Module):
    """Convolution, batch normalisation, SiLU."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, *, groups: int = 1, act: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(c2, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """Two 3x3 convolutions and, if the widths agree, a shortcut."""

    def __init__(self, c1: int, c2: int, *, expansion: float = 0.5) -> None:
        super().__init__()
        hidden = int(c2 * expansion)
        self.cv1 = Conv(c1, hidden, 3)
        self.cv2 = Conv(hidden, c2, 3)
        self.add = c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


class C3k(nn.Module):
    """Two branches of half width, one of them through two bottlenecks, joined by a 1x1 convolution."""

    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        hidden = c2 // 2
        self.cv1 = Conv(c1, hidden)
        self.cv2 = Conv(c1, hidden)
        self.cv3 = Conv(2 * hidden, c2)
        self.m = nn.Sequential(*(Bottleneck(hidden, hidden, expansion=1.0) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class C3k2(nn.Module):
    """Splits the channels, sends one half through n blocks in a row and joins everything seen on the way."""

    def __init__(self, c1: int, c2: int, n: int, *, c3k: bool, expansion: float = 0.5) -> None:
        super().__init__()
        hidden = int(c2 * expansion)
        self.cv1 = Conv(c1, 2 * hidden)
        self.cv2 = Conv((2 + n) * hidden, c2)
        self.m = nn.ModuleList(C3k(hidden, hidden) if c3k else Bottleneck(hidden, hidden) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            parts.append(block(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class SPPF(nn.Module):
    """Three 5x5 max-poolings in a row: windows of 5, 9 and 13."""

    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        hidden = c1 // 2
        self.cv1 = Conv(c1, hidden)
        self.cv2 = Conv(hidden * 4, c2)
        self.m = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.cv1(x)]
        for _ in range(3):
            parts.append(self.m(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class Attention(nn.Module):
    """Self-attention over all pixels, with keys of half the head's width and a depthwise position code."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = dim // heads
        self.key_dim = self.head_dim // 2
        self.scale = self.key_dim**-0.5
        self.qkv = Conv(dim, dim + 2 * self.key_dim * heads, act=False)
        self.proj = Conv(dim, dim, act=False)
        self.pe = Conv(dim, dim, 3, groups=dim, act=False)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        per_head = self.qkv(x).view(b, self.heads, self.key_dim * 2 + self.head_dim, h * w)
        q, k, v = per_head.split([self.key_dim, self.key_dim, self.head_dim], 2)
        weights = ((q * self.scale).transpose(-2, -1) @ k).softmax(-1)
        y = (v @ weights.transpose(-2, -1)).view(b, c, h, w) + self.pe(v.reshape(b, c, h, w))
        return self.proj(y)


class PSABlock(nn.Module):
    """Attention and a two-layer feed-forward network, both with shortcuts."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attn = Attention(dim, dim // 64)
        self.ffn = nn.Sequential(Conv(dim, dim * 2), Conv(dim * 2, dim, act=False))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.ffn(x)


class C2PSA(nn.Module):
    """Half of the channels goes through n attention blocks."""

    def __init__(self, c: int, n: int) -> None:
        super().__init__()
        self.hidden = c // 2
        self.cv1 = Conv(c, 2 * self.hidden)
        self.cv2 = Conv(2 * self.hidden, c)
        self.m = nn.Sequential(*(PSABlock(self.hidden) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.cv1(x).split((self.hidden, self.hidden), 1)
        return self.cv2(torch.cat((a, self.m(b)), 1))
