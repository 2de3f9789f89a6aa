"""The Llama decoder in plain PyTorch with a KV cache, and its export to ONNX; the language part of MobileVLM V2.

Parameter names are those of the published checkpoints without `model.` in front (`layers.0.self_attn.q_proj.weight`,
`norm.weight`, `lm_head.weight`): `checkpoint_keys` translates. Token embeddings are not part of it: the graph starts
at `inputs_embeds`, where image tokens have their place among the others.

    python reference/llama.py --size 1.7b --layers 24 --out decoder.onnx      random weights

Shapes: S new tokens, P cached ones, D hidden, H heads, d = D / H.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import onnx
import torch
from torch import Tensor, nn


class Size(NamedTuple):
    """Sizes of a decoder, as in the published config.json files."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int = 32000
    epsilon: float = 1e-6
    theta: float = 10000.0


SIZES = {
    "tiny": Size(64, 176, 2, 4, vocabulary=96),
    "1.7b": Size(2048, 5632, 24, 16),
    "3b": Size(2560, 6912, 32, 32),
    "7b": Size(4096, 11008, 32, 32, epsilon=1e-5),
}
"""MobileVLM V2's language models, and one for tests."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight, over the last axis."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of (1, H, S, d): pairs (i, i + d / 2) turn by an angle that grows with the position."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal self-attention of S new tokens over P + S."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(size.hidden, size.hidden, bias=False) for _ in range(4)
        )

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        k = torch.cat((past[0], rotate(k, cos, sin)), dim=2)
        v = torch.cat((past[1], v), dim=2)
        scores = rotate(q, cos, sin) @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + bias
        mixed = scores.softmax(-1) @ v
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), (k, v)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size.hidden, size.intermediate, bias=False)
        self.up_proj = nn.Linear(size.hidden, size.intermediate, bias=False)
        self.down_proj = nn.Linear(size.intermediate, size.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and MLP, each on the normalised stream and added to it."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.self_attn = Attention(size)
        self.mlp = MLP(size)
        self.input_layernorm = RMSNorm(size.hidden, size.epsilon)
        self.post_attention_layernorm = RMSNorm(size.hidden, size.epsilon)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        mixed, present = self.self_attn(self.input_layernorm(x), cos, sin, bias, past)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), present


class Decoder(nn.Module):
    """From embeddings to logits.

    `forward` takes inputs_embeds (1, S, D), attention_mask (1, P + S) of 0 and 1, position_ids (1, S) and per layer
    the cached keys and values (1, H, P, d); it returns logits (1, S, vocabulary) and per layer keys and values
    (1, H, P + S, d). P may be 0.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.norm = RMSNorm(size.hidden, size.epsilon)
        self.lm_head = nn.Linear(size.hidden, size.vocabulary, bias=False)

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        width = self.size.hidden // self.size.heads
        turns = self.size.theta ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
        angles = position_ids[:, None, :, None].float() * torch.cat((turns, turns))
        cos, sin = angles.cos(), angles.sin()
        total, new = attention_mask.shape[1], inputs_embeds.shape[1]
        positions = torch.arange(total)
        seen = (positions[None, :] <= positions[total - new :, None]) & (attention_mask[:, None, None, :] > 0)
        bias = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        x, presents = inputs_embeds, []
        for index, layer in enumerate(self.layers):
            x, present = layer(x, cos, sin, bias, (past[2 * index], past[2 * index + 1]))
            presents += present
        return self.lm_head(self.norm(x)), *presents


def checkpoint_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a published checkpoint's tensors that belong to the decoder, under this module's names."""
    names = {key: key.removeprefix("model.") for key in state}
    parts = ("layers.", "norm.", "lm_head.")
    return {name: state[key] for key, name in names.items() if name.startswith(parts)}


def random_decoder(size: Size, seed: int = 0) -> Decoder:
    """A decoder with weights of the usual scale: deviation 0.02, less where a branch joins the stream."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = Decoder(size)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.uniform_(0.5, 1.5)
        else:
            joins = name.endswith(("o_proj.weight", "down_proj.weight"))
            parameter.normal_(0.0, 0.02 / (2 * size.layers) ** 0.5 if joins else 0.02)
    return model


def input_names(size: Size) -> list[str]:
    """Names of the graph's inputs, in order."""
    caches = [f"past.{i}.{kind}" for i in range(size.layers) for kind in ("key", "value")]
    return ["inputs_embeds", "attention_mask", "position_ids", *caches]


def shapes(size: Size, tokens: int, past: int = 0) -> dict[str, tuple[int, ...]]:
    """Shapes of the graph's inputs for `tokens` new tokens behind `past` cached ones."""
    names = input_names(size)
    cache = (1, size.heads, past, size.hidden // size.heads)
    head = [(1, tokens, size.hidden), (1, past + tokens), (1, tokens)]
    return dict(zip(names, [*head, *[cache] * (2 * size.layers)], strict=True))


def export(model: Decoder, path: Path) -> None:
    """Write the decoder with open S and P into an empty folder; its weights become files beside it."""
    names = input_names(model.size)
    outputs = ["logits", *(name.replace("past", "present") for name in names[3:])]
    axes = {
        "inputs_embeds": {1: "new"},
        "attention_mask": {1: "total"},
        "position_ids": {1: "new"},
        "logits": {1: "new"},
    }
    axes |= {name: {2: "past"} for name in names[3:]} | {name: {2: "total"} for name in outputs[1:]}
    sizes = shapes(model.size, 5, 3)
    kinds = {name: torch.int64 for name in ("attention_mask", "position_ids")}
    example = tuple(torch.ones(sizes[name], dtype=kinds.get(name, torch.float32)) for name in names)
    with torch.no_grad():
        torch.onnx.export(
            model, example, str(path), input_names=names, output_names=outputs, dynamic_axes=axes, opset_version=17,
            dynamo=False,
        )  # fmt: skip
    if (
        len(list(path.parent.iterdir())) == 1 and path.stat().st_size > 1 << 20
    ):  # below 2 GB the exporter keeps one file
        data = path.with_name(path.name + ".data").name
        onnx.save_model(onnx.load(path), path, save_as_external_data=True, location=data)


def main() -> None:
    """Export a decoder with random weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1.7b")
    parser.add_argument("--layers", type=int, help="another number of layers than the size has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    size = SIZES[options.size]
    size = size._replace(layers=options.layers or size.layers)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    export(random_decoder(size, options.seed), options.out)


if __name__ == "__main__":
    main()
