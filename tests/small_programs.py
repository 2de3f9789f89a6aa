"""Small programs with random weights in the layout of the exported ones, and a tokenizer, all written here."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bitalloy.samples.drawing import CLASSES, COLORS
from bitalloy.tasks.captions import QUESTION
from bitalloy.tasks.chat import TEMPLATE
from bitalloy.tasks.questions import LETTER, SHORT

Shape = Sequence[int | str]
WIDTH, HEADS, LAYERS = 16, 2, 2
SIDE = 64
INT64 = TensorProto.INT64


class Net:
    """A growing graph; each method gives the name of its result."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: str, module: str = "", **attributes: Any) -> str:
        name = f"t{len(self._nodes)}"
        node = helper.make_node(kind, list(inputs), [name], name=f"/{module}/{kind}_{len(self._nodes)}", **attributes)
        self._nodes.append(node)
        return name

    def const(self, value: object) -> str:
        name = f"c{len(self._constants)}"
        array = np.asarray(value)
        self._constants.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, *shape: int, spread: float | None = None) -> str:
        scale = spread if spread is not None else np.prod(shape[:-1] if len(shape) == 2 else shape[1:]) ** -0.5
        return self.const((self._random.standard_normal(shape) * scale).astype(np.float32))

    def linear(self, x: str, inside: int, outside: int, module: str) -> str:
        return self.op("MatMul", x, self.weight(inside, outside), module=module)

    def silu(self, x: str, module: str) -> str:
        return self.op("Mul", x, self.op("Sigmoid", x, module=module), module=module)

    def reshape(self, x: str, *shape: int) -> str:
        return self.op("Reshape", x, self.const(np.array(shape)))

    def save(
        self,
        path: Path,
        inputs: Mapping[str, tuple[int, Shape]],
        outputs: Mapping[str, tuple[str, Shape]],
        **metadata: object,
    ) -> None:
        """`inputs`: name -> (type, shape); `outputs`: name -> (result, shape)."""
        for name, (result, _) in outputs.items():
            self._nodes.append(helper.make_node("Identity", [result], [name], name=f"/out/{name}"))
        graph = helper.make_graph(
            self._nodes,
            "g",
            [helper.make_tensor_value_info(n, kind, list(s)) for n, (kind, s) in inputs.items()],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(s)) for n, (_, s) in outputs.items()],
            self._constants,
        )
        model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
        for key, value in metadata.items():
            model.metadata_props.add(key=f"bitalloy.{key}", value=json.dumps(value))
        onnx.checker.check_model(model)
        path.write_bytes(model.SerializeToString())


FLOAT = TensorProto.FLOAT
PROTECT = [{"pattern": "*/mask_decoder/*", "reason": "Outliers.", "source": "a paper"}]


def write_promptable(folder: Path) -> Path:
    """Image (1, 3, 64, 64) -> embeddings (1, 16, 8, 8); with points -> masks (1, 4, 16, 16), quality (1, 4)."""
    folder.mkdir(parents=True, exist_ok=True)
    net, x, inside = Net(0), "image", 3
    for i, outside in enumerate((32, 32, WIDTH)):
        weight = net.weight(outside, inside, 3, 3, spread=(2 / (9 * inside)) ** 0.5)
        x = net.op("Conv", x, weight, module=f"image_encoder/{i}", strides=[2, 2], pads=[1] * 4)
        x, inside = (net.silu(x, f"image_encoder/{i}") if i < 2 else x), outside
    net.save(folder / "encoder.onnx", {"image": (FLOAT, (1, 3, SIDE, SIDE))}, {"emb": (x, (1, WIDTH, 8, 8))})

    net = Net(1)
    places = net.op("Mul", "point_coords", net.const(np.float32(4 / SIDE)), module="prompt_encoder")
    points = net.linear(places, 2, WIDTH, "prompt_encoder")
    kinds = net.op("Unsqueeze", "point_labels", net.const(np.array([2])))
    points = net.op("Add", points, net.linear(kinds, 1, WIDTH, "prompt_encoder"), module="prompt_encoder")
    prompt = net.op("ReduceMean", points, module="prompt_encoder", axes=[1], keepdims=1)
    pixels = net.op("Transpose", net.reshape("image_embeddings", 1, WIDTH, 64), perm=[0, 2, 1])
    y = net.silu(net.op("Add", pixels, prompt, module="mask_decoder"), "mask_decoder")
    y = net.silu(net.linear(y, WIDTH, WIDTH, "mask_decoder/mlp"), "mask_decoder/mlp")
    masks = net.linear(y, WIDTH, 16, "mask_decoder/masks")
    masks = net.reshape(
        net.op("Transpose", net.reshape(masks, 1, 8, 8, 4, 2, 2), perm=[0, 3, 1, 4, 2, 5]), 1, 4, 16, 16
    )
    quality = net.linear(net.op("ReduceMean", y, axes=[1], keepdims=0), WIDTH, 4, "mask_decoder/iou")
    net.save(
        folder / "decoder.onnx",
        {
            "image_embeddings": (FLOAT, (1, WIDTH, 8, 8)),
            "point_coords": (FLOAT, (1, "points", 2)),
            "point_labels": (FLOAT, (1, "points")),
        },
        {"low_res_masks": (masks, (1, 4, 16, 16)), "iou_predictions": (quality, (1, 4))},
        shapes={"point_coords": (1, 2, 2), "point_labels": (1, 2)},
        protect=PROTECT,
    )
    return _wired(folder, ("encoder", "decoder"), ["encoder:emb -> decoder:image_embeddings"])


def write_language(folder: Path) -> Path:
    """Vision (1, 3, 32, 32) -> 4 tokens; embedding; a decoder of two layers with rotary-free attention and a cache."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(folder)
    net = Net(2)
    x = net.op("Conv", "pixel_values", net.weight(WIDTH, 3, 16, 16), module="vision_tower", strides=[16, 16])
    x = net.op("Transpose", net.reshape(x, 1, WIDTH, 4), perm=[0, 2, 1])
    x = net.linear(net.silu(net.linear(x, WIDTH, WIDTH, "mm_projector"), "mm_projector"), WIDTH, WIDTH, "mm_projector")
    net.save(folder / "vision.onnx", {"pixel_values": (FLOAT, (1, 3, 32, 32))}, {"image_features": (x, (1, 4, WIDTH))})
    net = Net(3)
    table = net.weight(vocabulary, WIDTH, spread=1.0)
    parts = [net.op("Gather", table, "before"), "image_features", net.op("Gather", table, "after")]
    net.save(
        folder / "embedding.onnx",
        {
            "before": (INT64, (1, "before")),
            "image_features": (FLOAT, (1, "tokens", WIDTH)),
            "after": (INT64, (1, "after")),
        },
        {"inputs_embeds": (net.op("Concat", *parts, axis=1), (1, "new", WIDTH))},
    )
    _decoder(folder / "decoder.onnx", vocabulary)
    wires = ["vision:image_features -> embedding:image_features", "embedding:inputs_embeds -> decoder:inputs_embeds"]
    return _wired(folder, ("vision", "embedding", "decoder"), wires)


def _decoder(path: Path, vocabulary: int) -> None:
    net, x, half = Net(4), "inputs_embeds", WIDTH // HEADS
    seen = net.op("Sub", net.op("CumSum", "attention_mask", net.const(np.array(1))), net.const(np.array(1)))
    seen = net.op("Unsqueeze", seen, net.const(np.array([1])))  # (1, 1, all)
    own = net.op("Unsqueeze", "position_ids", net.const(np.array([2])))  # (1, new, 1)
    hidden = net.op("Greater", seen, own)
    bias = net.op("Where", hidden, net.const(np.float32(-1e9)), net.const(np.float32(0)))
    bias = net.op("Unsqueeze", bias, net.const(np.array([1])))
    angle = net.op("Mul", net.op("Cast", own, to=FLOAT), net.const(np.linspace(0.1, 1.5, WIDTH, dtype=np.float32)))
    x = net.op("Add", x, net.op("Sin", angle), module="model")
    outputs = {}
    for layer in range(LAYERS):
        module = f"model/layers.{layer}/self_attn"
        q, k, v = (net.linear(x, WIDTH, WIDTH, f"{module}/{n}") for n in "qkv")
        q, k, v = (
            net.op("Transpose", net.reshape(t, 1, -1, HEADS, half), perm=[0, 2, 1, 3], module=module) for t in (q, k, v)
        )
        q = net.op("Mul", q, net.const(np.float32(half**-0.5)), module=module)
        k = net.op("Concat", f"past.{layer}.key", k, axis=2, module=module)
        v = net.op("Concat", f"past.{layer}.value", v, axis=2, module=module)
        for name, value in (("key", k), ("value", v)):
            outputs[f"present.{layer}.{name}"] = (value, (1, HEADS, "all", half))
        scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2], module=module), module=module)
        weights = net.op("Softmax", net.op("Add", scores, bias, module=module), axis=-1, module=module)
        y = net.op("Transpose", net.op("MatMul", weights, v, module=module), perm=[0, 2, 1, 3], module=module)
        x = net.op("Add", x, net.linear(net.reshape(y, 1, -1, WIDTH), WIDTH, WIDTH, f"{module}/o"), module=module)
        module = f"model/layers.{layer}/mlp"
        y = net.silu(net.linear(x, WIDTH, 2 * WIDTH, f"{module}/up"), module)
        x = net.op("Add", x, net.linear(y, 2 * WIDTH, WIDTH, f"{module}/down"), module=module)
    logits = net.linear(x, WIDTH, vocabulary, "lm_head")
    past = {f"past.{i}.{k}": (FLOAT, (1, HEADS, "past", half)) for i in range(LAYERS) for k in ("key", "value")}
    inputs = {
        "inputs_embeds": (FLOAT, (1, "new", WIDTH)),
        "attention_mask": (INT64, (1, "all")),
        "position_ids": (INT64, (1, "new")),
        **past,
    }
    net.save(path, inputs, {"logits": (logits, (1, "new", vocabulary)), **outputs}, heads=["logits"])


def _wired(folder: Path, names: Sequence[str], wires: list[str]) -> Path:
    content = {"graphs": {name: f"{name}.onnx" for name in names}, "wires": wires}
    (folder / "program.json").write_text(json.dumps(content))
    return folder


def write_tokenizer(folder: Path) -> int:
    """`tokenizer.model` with bytes and the beginnings of the words of `shapes`, so that each word is one token."""
    texts = [TEMPLATE, QUESTION, SHORT, LETTER, "Is there a an in the image? How many shapes are yes no", "."]
    texts += [f"{c} {c}s" for c in CLASSES] + list(COLORS) + ["one two three four five six seven eight and"]
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)] + [(f"<0x{b:02X}>", 0.0, 6) for b in range(256)]
    starts = dict.fromkeys(
        f"\u2581{word}"[:end] for text in texts for word in text.split() for end in range(1, len(word) + 2)
    )
    letters = dict.fromkeys(c for text in texts for c in text if not c.isspace())
    pieces += [(piece, -float(i), 1) for i, piece in enumerate([*starts, *letters])]
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(pieces))
    return len(pieces)


def sentencepiece_model(pieces: Sequence[tuple[str, float, int]], **normalizer: bool) -> bytes:
    """A SentencePiece `ModelProto`, byte by byte: text, score and kind of every piece; byte-pair encoding."""

    def varint(value: int) -> bytes:
        out = bytearray()
        while value >= 0x80:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        return bytes([*out, value])

    def record(field: int, content: bytes) -> bytes:
        return varint(field << 3 | 2) + varint(len(content)) + content

    body = b"".join(
        record(1, record(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + varint(kind))
        for text, score, kind in pieces
    )
    settings = {"add_dummy_prefix": 3, "remove_extra_whitespaces": 4}
    chosen = {"add_dummy_prefix": True, "remove_extra_whitespaces": False, **normalizer}
    rules = b"".join(varint(settings[name] << 3) + varint(value) for name, value in chosen.items())
    bytes_too = any(kind == 6 for _, _, kind in pieces)
    return body + record(2, varint(3 << 3) + varint(2) + varint(35 << 3) + varint(bytes_too)) + record(3, rules)
