"""MobileSAM from the parts of kornia, cut into the two graphs that run at different times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def build_sam(numbers: Mapping[str, Any], side: int) -> Any:
    """Build MobileSAM of any width, with random weights, for square images of `side` pixels, a multiple of 16.

    Modules and tensors have the names of the published network, which the numbers of `mobilesam` give back.
    """
    from kornia.models.common import LayerNorm2d
    from kornia.models.sam import Sam
    from kornia.models.sam.architecture.mask_decoder import MaskDecoder as KorniaMaskDecoder
    from kornia.models.sam.architecture.prompt_encoder import PromptEncoder as KorniaPromptEncoder
    from kornia.models.sam.architecture.transformer import TwoWayTransformer
    from kornia.models.tiny_vit import TinyViT

    width, grid = numbers["width"], side // 16
    encoder = TinyViT(
        img_size=side,
        num_classes=numbers["classes"],
        embed_dims=numbers["encoder_widths"],
        depths=numbers["encoder_depths"],
        num_heads=numbers["encoder_heads"],
        window_sizes=numbers["encoder_windows"],
        mobile_sam=True,
    )
    encoder.neck = nn.Sequential(
        nn.Conv2d(numbers["encoder_widths"][-1], width, 1, bias=False),
        LayerNorm2d(width),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        LayerNorm2d(width),
    )
    return Sam(
        image_encoder=encoder,
        prompt_encoder=KorniaPromptEncoder(
            embed_dim=width, image_embedding_size=(grid, grid), input_image_size=(side, side), mask_in_chans=16
        ),
        mask_decoder=KorniaMaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(
                depth=2, embedding_dim=width, mlp_dim=numbers["mlp"], num_heads=numbers["heads"]
            ),
            transformer_dim=width,
            iou_head_depth=3,
            iou_head_hidden_dim=width,
        ),
    )


def resize_sam(sam: Any, side: int) -> None:
    """Prepare a network, in place, for another side in pixels, a multiple of 16: no weight depends on it."""
    old = sam.image_encoder.img_size
    if side == old:
        return
    for module in sam.image_encoder.modules():
        for name in ("input_resolution", "output_resolution"):
            if hasattr(module, name):
                height, width = getattr(module, name)
                setattr(module, name, (height * side // old, width * side // old))
    sam.image_encoder.img_size, sam.image_encoder.feat_size = side, side // 16
    sam.prompt_encoder.image_embedding_size = (side // 16, side // 16)
    sam.prompt_encoder.input_image_size = (side, side)


class Encoder(nn.Module):
    """(1, 3, S, S) normalised, zero-padded image -> (1, width, S/16, S/16) embeddings."""

    def __init__(self, sam: Any) -> None:
        super().__init__()
        self.image_encoder = sam.image_encoder

    def forward(self, image: Tensor) -> Tensor:
        return self.image_encoder(image)


class PromptEncoder(nn.Module):
    """Points with labels -> (1, N, width) tokens, without assignments to selected elements, which do not trace."""

    table: Tensor
    """Embeddings that each label -1 to 3 adds to its point, (5, width)."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.pe_layer = original.pe_layer
        self.size = original.input_image_size
        tables = [original.not_a_point_embed, *original.point_embeddings]
        self.register_buffer("table", torch.cat([t.weight.detach() for t in tables]))

    def forward(self, coords: Tensor, labels: Tensor) -> Tensor:
        where = self.pe_layer.forward_with_coords(coords + 0.5, self.size)  # centres of pixels
        is_point = (labels >= 0).to(where.dtype).unsqueeze(-1)  # padding has no place
        return where * is_point + self.table[labels.to(torch.int64) + 1]


class MaskDecoder(nn.Module):
    """Calls the decoder's prediction of all masks as its forward, so that node names keep the module's path."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)
        self.num_mask_tokens = original.num_mask_tokens
        self._predict = type(original).predict_masks

    def forward(self, embeddings: Tensor, positions: Tensor, sparse: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        return self._predict(self, embeddings, positions, sparse, dense)


class PromptedDecoder(nn.Module):
    """Embeddings and prompts -> (1, 4, S/4, S/4) mask logits and (1, 4) predicted IoU.

    `point_coords` (1, N, 2) are x, y in pixels of the padded image; `point_labels` (1, N) say what each is: 1 object,
    0 background, 2 and 3 top left and bottom right of a box, -1 padding. A prompt without a box ends with one (0, 0)
    point of label -1, as in the official predictor.
    """

    def __init__(self, sam: Any) -> None:
        super().__init__()
        self.prompt_encoder = PromptEncoder(sam.prompt_encoder)
        self.mask_decoder = MaskDecoder(sam.mask_decoder)
        self.register_buffer("positions", sam.prompt_encoder.get_dense_pe().detach().clone())
        self.register_buffer("no_mask", sam.prompt_encoder.no_mask_embed.weight.detach().reshape(1, -1, 1, 1).clone())

    def forward(self, image_embeddings: Tensor, point_coords: Tensor, point_labels: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.prompt_encoder(point_coords, point_labels)
        return self.mask_decoder(image_embeddings, self.positions, tokens, self.no_mask)
