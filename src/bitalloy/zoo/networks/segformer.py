"""SegFormer without the containers that transformers puts around its results."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Segmenter(nn.Module):
    """(B, 3, H, W) normalised pixels -> (B, classes, H/4, W/4) logits; modules keep the names of transformers."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.segformer = model.segformer
        self.decode_head = model.decode_head

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.decode_head(self.segformer(pixel_values, output_hidden_states=True).hidden_states)
