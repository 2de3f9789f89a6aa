"""Whole exported networks with the operators of each model family, against central differences in torch.

The networks are small stand-ins with random weights, written in plain torch. The rig exports them in both dialects,
carries random cotangents of all outputs back to every floating-point input, and compares with differences of the
torch network in float64.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
Module: Any = torch.nn.Module
nn, F = torch.nn, torch.nn.functional
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.parametrize("dialect", ["script", "export"])]
Array = np.ndarray[Any, Any]
Tensor = Any


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + bias, -1) @ v


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


class Attention(Module):
    """Multi-head attention between two sequences, with an optional bias on the scores."""

    def __init__(self, dim: int, count: int, inner: int | None = None) -> None:
        super().__init__()
        self.count = count
        self.q, self.k, self.v = (nn.Linear(dim, inner or dim) for _ in range(3))
        self.out = nn.Linear(inner or dim, dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        q, k, v = (heads(part(x), self.count) for part, x in ((self.q, q), (self.k, k), (self.v, v)))
        return self.out(attend(q, k, v, bias).transpose(1, 2).flatten(2))


class ChannelNorm(Module):
    """LayerNorm over the channels of an image, written out."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(dim) + 0.5), nn.Parameter(torch.randn(dim))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        x = centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class Segmenter(Module):
    """A detector's head of YOLO11-seg: detections with mask coefficients, and prototypes through a ConvTranspose."""

    def __init__(self) -> None:
        super().__init__()
        path = Path(__file__).resolve().parents[2] / "reference" / "yolo11.py"
        spec = importlib.util.spec_from_file_location("reference_yolo11", path)
        assert spec is not None and spec.loader is not None
        yolo11 = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(yolo11)
        self.detector = yolo11.fuse(yolo11.Yolo11(3, scale="n").eval())
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.SiLU())
        self.proto = nn.Sequential(nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv2d(8, 8, 3, padding=1), nn.SiLU(),
                                   nn.Conv2d(8, 4, 1))  # fmt: skip
        self.masks = nn.ModuleList([nn.Conv2d(8, 4, 1, s) for s in (2, 4, 8)])

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        found, x = self.detector(image), self.stem(image)
        coefficients = torch.cat([m(x).flatten(2) for m in self.masks], 2)
        return torch.cat([found, coefficients], 1), self.proto(x)


class SegFormer(Module):
    """Two stages with overlapping patches, attention on a reduced sequence, Mix-FFN, and the all-MLP decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        for before, dim, stride, reduce in ((3, 8, 4, 2), (8, 12, 2, 1)):
            self.stages.append(nn.ModuleDict({
                "patch": nn.Conv2d(before, dim, 2 * stride - 1, stride, stride - 1), "first": nn.LayerNorm(dim),
                "norm": nn.LayerNorm(dim), "attention": Attention(dim, 2), "norm2": nn.LayerNorm(dim),
                "reduce": nn.Conv2d(dim, dim, reduce, reduce), "reduced": nn.LayerNorm(dim),
                "fc1": nn.Linear(dim, 2 * dim), "depth": nn.Conv2d(2 * dim, 2 * dim, 3, padding=1, groups=2 * dim),
                "fc2": nn.Linear(2 * dim, dim), "last": nn.LayerNorm(dim), "linear": nn.Linear(dim, 8),
            }))  # fmt: skip
        self.fuse = nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.classify = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        levels: list[Tensor] = []
        for s in self.stages:
            x = s["patch"](x)
            size = x.shape[-2:]
            t = s["first"](x.flatten(2).transpose(1, 2))
            y = s["norm"](t)
            short = s["reduced"](s["reduce"](y.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2))
            t = t + s["attention"](y, short, short)
            y = s["depth"](s["fc1"](s["norm2"](t)).transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2)
            t = s["last"](t + s["fc2"](F.gelu(y)))
            x = t.transpose(1, 2).unflatten(2, size)
            level = s["linear"](t).transpose(1, 2).unflatten(2, size)
            first = levels[0].shape[-2:] if levels else size
            levels.append(F.interpolate(level, first, mode="bilinear", align_corners=False))
        return self.classify(self.fuse(torch.cat(levels[::-1], 1)))


class Encoder(Module):
    """MobileSAM's image encoder: convolutions with folded norms and GELU, padded windows of attention with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.GELU()),
            *(nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.GELU()),
        )
        self.norm, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.bias = nn.Parameter(torch.randn(2, 9))
        places = torch.arange(9)
        self.register_buffer("index", (places[:, None] - places).abs())
        self.local = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.neck = nn.Sequential(nn.Conv2d(8, 6, 1, bias=False), ChannelNorm(6), nn.Conv2d(6, 6, 3, padding=1),
                                  ChannelNorm(6))  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        t = F.pad(self.norm(x), (0, 0, 0, -w % 3, 0, -h % 3))
        rows, columns = t.shape[1] // 3, t.shape[2] // 3
        t = t.view(b, rows, 3, columns, 3, c).transpose(2, 3).reshape(b * rows * columns, 9, c)
        q, k, v = self.qkv(t).view(-1, 9, 2, 12).permute(0, 2, 1, 3).split([4, 4, 4], dim=3)
        t = self.out(attend(q, k, v, self.bias[:, self.index]).transpose(1, 2).reshape(-1, 9, c))
        t = t.view(b, rows, columns, 3, 3, c).transpose(2, 3).reshape(b, rows * 3, columns * 3, c)
        x = x + t[:, :h, :w].contiguous()
        x = self.local(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.mlp(self.norm2(x))
        return self.neck(x.permute(0, 3, 1, 2))


class PromptDecoder(Module):
    """SAM's prompt encoder and mask decoder: Fourier features, two-way attention, upscaling, hypernetworks."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gauss", torch.randn(2, 4))
        self.register_buffer("place", torch.randn(1, 8, 4, 4))
        self.none, self.kinds, self.tokens = (nn.Parameter(torch.randn(n, 8)) for n in (1, 2, 3))
        self.own, self.cross, self.back = Attention(8, 2), Attention(8, 2, 4), Attention(8, 2, 4)
        self.norms = nn.ModuleList([nn.LayerNorm(8) for _ in range(4)])
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.up = nn.Sequential(
            *(nn.ConvTranspose2d(8, 4, 2, 2), ChannelNorm(4), nn.GELU(), nn.ConvTranspose2d(4, 4, 2, 2), nn.GELU())
        )
        self.hyper = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2)])
        self.score = nn.Linear(8, 2)

    def forward(self, image: Tensor, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        angles = 2 * math.pi * ((2 * (points + 0.5) / 16 - 1) @ self.gauss)
        prompt = torch.cat([torch.sin(angles), torch.cos(angles)], -1)
        kind = labels.unsqueeze(-1)
        prompt = torch.where(kind == -1, torch.zeros_like(prompt) + self.none, prompt)
        for i in range(2):
            prompt = prompt + torch.where(kind == i, self.kinds[i], torch.zeros_like(prompt))
        tokens = torch.cat([self.tokens.unsqueeze(0).expand(points.shape[0], -1, -1), prompt], 1)
        keys, place = image.flatten(2).transpose(1, 2), self.place.flatten(2).transpose(1, 2)
        queries = self.norms[0](tokens + self.own(tokens, tokens, tokens))
        queries = self.norms[1](queries + self.cross(queries + tokens, keys + place, keys))
        queries = self.norms[2](queries + self.mlp(queries))
        keys = self.norms[3](keys + self.back(keys + place, queries + tokens, queries))
        upscaled = self.up(keys.transpose(1, 2).view(1, 8, 4, 4))
        weights = torch.stack([h(queries[:, 1 + i]) for i, h in enumerate(self.hyper)], 1)
        b, c, h, w = upscaled.shape
        return (weights @ upscaled.view(b, c, h * w)).view(b, -1, h, w), self.score(queries[:, 0])


class VisionTower(Module):
    """CLIP's vision tower with the fused attention of torch, and the projector LDPv2."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4, bias=False)
        self.first, self.place = nn.Parameter(torch.randn(8)), nn.Embedding(17, 8)
        self.register_buffer("ids", torch.arange(17)[None])
        self.pre, self.norm, self.norm2 = (nn.LayerNorm(8) for _ in range(3))
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)
        self.project = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 6))
        self.peg = nn.Conv2d(6, 6, 3, padding=1, groups=6)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(pixels.shape[0], 1, -1), x], 1) + self.place(self.ids)
        x = self.pre(x)
        y = self.norm(x)
        q, k, v = (heads(part(y), 2) for part in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = self.fc1(self.norm2(x))
        x = x + self.fc2(y * torch.sigmoid(1.702 * y))
        x = self.project(x[:, 1:]).transpose(1, 2).unflatten(2, (4, 4))
        x = F.avg_pool2d(x, 2)
        return (x + self.peg(x)).flatten(2).transpose(1, 2)


class LanguageModel(Module):
    """A Llama layer with cache: RMSNorm written out, rotary positions, grouped keys, causal mask, SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2, self.last = (nn.Parameter(torch.rand(16) + 0.5) for _ in range(3))
        self.q, self.k, self.v, self.out = (nn.Linear(16, n, bias=False) for n in (16, 8, 8, 16))
        self.gate, self.up = (nn.Linear(16, 24, bias=False) for _ in range(2))
        self.down, self.head = nn.Linear(24, 16, bias=False), nn.Linear(16, 20, bias=False)
        self.register_buffer("frequencies", 100.0 ** (-torch.arange(2) / 2))

    def rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    def forward(self, x: Tensor, mask: Tensor, places: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        angles = (self.frequencies[None, :, None] @ places[:, None].to(x.dtype)).transpose(1, 2)
        angles = torch.cat((angles, angles), -1)[:, None]
        cos, sin = angles.cos(), angles.sin()
        y = self.rms(x, self.norm)
        q, k, v = (part(y).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        keys = torch.cat([keys, self.turn(k, cos, sin)], 2)
        values = torch.cat([values, v], 2)
        b, groups, total, d = keys.shape
        wide_k, wide_v = (t[:, :, None].expand(b, groups, 2, total, d).reshape(b, 4, total, d) for t in (keys, values))
        past, count = total - x.shape[1], x.shape[1]
        seen = torch.ones(count, total, dtype=torch.bool).tril(past) & mask[:, None, None].bool()
        bias = torch.where(seen, 0.0, torch.finfo(torch.float32).min).to(x.dtype)
        x = x + self.out(attend(self.turn(q, cos, sin), wide_k, wide_v, bias).transpose(1, 2).flatten(2))
        y = self.rms(x, self.norm2)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(self.rms(x, self.last)), keys, values


class Norms(Module):
    """What other networks have: instance and group norms, einsum, top-k, index reads and writes, unfolded sums."""

    def __init__(self) -> None:
        super().__init__()
        self.instance, self.group = nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(2, 4)
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.instance(x) + self.group(F.mish(x))
        y = torch.einsum("bchw,cd->bdhw", y, self.weight)
        best, at = y.flatten(1).topk(5)
        z = torch.cumsum(F.softplus(y), -1).prod(1).clamp(-8, 8)
        z = z.index_select(1, torch.tensor([2, 0, 0])) - torch.linalg.vector_norm(x, dim=1)[:, :3]
        other = F.normalize(y.flatten(1), dim=1).gather(1, (at * 2) % 48)
        return best, torch.logsumexp(z, -1), other, F.pixel_shuffle(x, 2) ** 2


def images(*shape: int) -> Tensor:
    return torch.rand(shape) * 2 - 1


CASES: dict[str, tuple[Any, Any]] = {
    "yolo11-seg": (Segmenter, lambda: [images(1, 3, 64, 64)]),
    "segformer": (SegFormer, lambda: [images(1, 3, 32, 32)]),
    "mobilesam-encoder": (Encoder, lambda: [images(1, 3, 16, 16)]),
    "mobilesam-decoder": (PromptDecoder, lambda: [images(1, 8, 4, 4), 16 * torch.rand(1, 3, 2),
                                                  torch.tensor([[1.0, 0.0, -1.0]])]),
    "mobilevlm-vision": (VisionTower, lambda: [images(1, 3, 16, 16)]),
    "mobilevlm-decoder": (LanguageModel, lambda: [images(1, 3, 16), torch.ones(1, 8, dtype=torch.long),
                                                  torch.arange(5, 8)[None], images(1, 2, 5, 4), images(1, 2, 5, 4)]),
    "norms": (Norms, lambda: [images(1, 4, 4, 4)]),
}  # fmt: skip


@pytest.mark.parametrize("family", CASES)
def test_family(exported: Any, family: str, dialect: str) -> None:
    if (family, dialect) == ("yolo11-seg", "export"):
        pytest.skip("takes half a minute to export, to nearly the same graph")
    torch.manual_seed(0)
    make, inputs = CASES[family]
    net = make().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    exported(net, inputs(), dialect)
