"""MobileVLM V2 from CLIP and Llama of transformers, with its own projector, cut into three graphs.

Tensor names are those of the published checkpoints once `split_state` has taken the containers' prefixes away.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

PREFIXES = (("model.vision_tower.", ""), ("model.mm_projector.", "mm_projector."))
"""Prefix of a published tensor name of the vision graph -> our prefix; other names are Llama's own."""
STALE_BUFFERS = ("position_ids", "rotary_emb.inv_freq")
"""Buffers that some versions of transformers stored."""


def split_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a published state dict into (vision tower and projector, language model).

    >>> vision, language = split_state({"model.vision_tower.vision_tower.vision_model.x": 1, "lm_head.weight": 2})
    >>> vision, language
    ({'vision_tower.x': 1}, {'lm_head.weight': 2})
    """
    vision: dict[str, Tensor] = {}
    language: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(STALE_BUFFERS):
            continue
        for prefix, ours in PREFIXES:
            if name.startswith(prefix):
                vision[ours + name.removeprefix(prefix).replace(".vision_model.", ".")] = tensor
                break
        else:
            language[name] = tensor
    return vision, language


class Mlp(nn.Module):
    """Two layers that bring patch features to the width of the language model."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class Peg(nn.Module):
    """Position code: a depthwise convolution added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.peg = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, groups=width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.peg(x)


class Projector(nn.Module):
    """LDPv2: (B, side**2, width) patches -> (B, side**2 / 4, out) tokens.

    Two linear layers, average pooling of 2 x 2 patches, and a position code.
    """

    def __init__(self, width: int, out: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.mlp = Mlp(width, out)
        self.pool = nn.AvgPool2d(2)
        self.peg = Peg(out)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.mlp(x).transpose(1, 2).unflatten(2, (self.side, self.side))
        return self.peg(self.pool(grid)).flatten(2).transpose(1, 2)


class Vision(nn.Module):
    """(B, 3, S, S) normalised image -> (B, tokens, width of the language model) features.

    The features are those before the last layer of CLIP, without the class token; the last layer is never used.
    """

    def __init__(self, clip: Any, out: int) -> None:
        super().__init__()
        config = clip.config
        self.vision_tower = clip
        self.mm_projector = Projector(config.hidden_size, out, config.image_size // config.patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        states = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        return self.mm_projector(states[-2][:, 1:])


class Embedding(nn.Module):
    """Token ids before and after an image, and the image's features, to the language model's (1, A + T + B, width).

    Each part may be empty: a token that was generated comes alone.
    """

    def __init__(self, llama: Any) -> None:
        super().__init__()
        self.embed_tokens = llama.model.embed_tokens

    def forward(self, before: Tensor, image_features: Tensor, after: Tensor) -> Tensor:
        return torch.cat((self.embed_tokens(before), image_features, self.embed_tokens(after)), 1)


class Decoder(nn.Module):
    """One step of the language model over S new positions after P past ones; P may be 0, so it also reads the prompt.

    (1, S, width) embeddings, (1, P + S) mask, (1, S) positions, and per layer (1, heads, P, head width) keys and
    values -> (1, S, vocabulary) logits and keys and values of P + S positions.
    """

    def __init__(self, llama: Any) -> None:
        super().__init__()
        self.model = llama.model
        self.lm_head = llama.lm_head
        named = inspect.signature(type(llama.model).forward).parameters
        self.cache_name = "cache" if "cache" in named else "past_key_values"  # renamed in transformers 5.24

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        from transformers.cache_utils import DynamicCache

        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        states = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **{self.cache_name: cache},
        ).last_hidden_state
        present = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        return (self.lm_head(states), *present)


def example(layers: int, heads: int, width: int, *, past: int, new: int) -> tuple[Tensor, ...]:
    """Draw random inputs of `Decoder`, with `past` positions in the cache and `new` ones."""
    return (
        torch.randn(1, new, width),
        torch.ones(1, past + new, dtype=torch.int64),
        torch.arange(past, past + new)[None],
        *(torch.randn(1, heads, past, width // heads) for _ in range(2 * layers)),
    )
