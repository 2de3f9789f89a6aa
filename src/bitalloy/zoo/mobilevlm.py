"""MobileVLM V2 (Meituan): CLIP vision tower, projector and Llama, as three graphs.

1. `vision`: an image becomes 144 tokens (36 in the reduced variant).
2. `embedding`: token ids become vectors, with those of the image between them.
3. `decoder`: Llama with its cache as inputs and outputs, for the prompt and for every token after it.

The published checkpoint holds all weights, CLIP's too. Its configuration names a model type that transformers does not
know, so it is read here. How the graphs generate text is in `mobilevlm_chat`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitalloy.core.errors import ModelError
from bitalloy.model import relevance
from bitalloy.model.graphs.wiring import write_wiring
from bitalloy.zoo import checkpoints, downloads
from bitalloy.zoo.base import RANDOM_WEIGHTS, Exported, Family, Options, ProtectionAdvice, Published, Remote, Variant
from bitalloy.zoo.exporting import ExportFacts, Signature, export_graph
from bitalloy.zoo.mobilevlm_chat import CLIP_DEVIATION, CLIP_MEAN, TOKENIZER_FILE

_EXTRA = "mobilevlm"
CLIP_SIDE = 336
CLIP_IMAGE = {"fit": "stretch", "mean": CLIP_MEAN, "std": CLIP_DEVIATION}
"""Preparation of images; that they are padded to a square belongs to the task."""
PROMPT, BEFORE_IMAGE = 256, 35
"""Number of positions of a usual prompt, and of its part before the image."""
CLIP = {
    "clip_hidden_size": 1024, "clip_intermediate_size": 4096, "clip_layers": 24, "clip_heads": 16, "clip_patch": 14,
    "vocabulary": 32000,
}  # fmt: skip
"""Configuration numbers of CLIP ViT-L/14 at 336 pixels, and the vocabulary size of Llama."""
FIELDS = {
    "hidden_size": "hidden_size", "intermediate_size": "intermediate_size", "layers": "num_hidden_layers",
    "heads": "num_attention_heads", "positions": "max_position_embeddings", "epsilon": "rms_norm_eps",
}  # fmt: skip
"""Our name of a configuration number -> its names in config.json and in transformers."""
PEAK = 2.2
"""Peak memory of an export over the float32 weights of the largest graph, measured as 2.1 with the 1.7B."""
MOBILEVLM_REGIONS = (
    (r"vision_tower/embeddings", "vision tower/embedding"),
    (r"vision_tower/encoder/layers\.(\d+)/self_attn", r"vision tower/layer \1/attention"),
    (r"vision_tower/encoder/layers\.(\d+)/mlp", r"vision tower/layer \1/MLP"),
    (r"vision_tower/encoder/layers\.(\d+)", r"vision tower/layer \1"),
    (r"vision_tower", "vision tower"),
    (r"mm_projector", "projector"),
    (r"embed_tokens(_1)?", "LM/embedding"),
    (r"model/layers\.(\d+)/self_attn", r"LM/layer \1/attention"),
    (r"model/layers\.(\d+)/mlp", r"LM/layer \1/MLP"),
    (r"model/layers\.(\d+)", r"LM/layer \1"),
    (r"model", "LM"),
    (r"lm_head", "LM/head"),
)
MOBILEVLM_PROTECTION = (
    ProtectionAdvice(
        pattern="*/lm_head/MatMul",
        reason="Its rounding goes straight into the logits, and a few large channels decide its range.",
        source="https://arxiv.org/abs/2211.10438, section 5 keeps the language-model head in half precision",
    ),
)
MOBILEVLM_WIRES = (
    "vision:image_features -> embedding:image_features",
    "embedding:inputs_embeds -> decoder:inputs_embeds",
)


def export_mobilevlm(variant: Variant, checkpoint: str | Path | None, options: Options, folder: Path) -> Exported:
    """Export MobileVLM: write `vision.onnx`, `embedding.onnx`, `decoder.onnx` (with `.data`) and `program.json`.

    Raises:
        ModelError: the image size is not the variant's, memory is too small, or the checkpoint is of another variant.
    """
    import torch

    from bitalloy.zoo.networks.mobilevlm import Decoder, Embedding, Vision, example, split_state

    if options.size not in (None, variant.size):
        side = variant.size[0]
        raise ModelError(f"'{variant.name}' takes images of {side}x{side}; leave --image-size out.")
    numbers: dict[str, Any] = dict(variant.architecture)
    _refuse_small_memory(variant.name, numbers)
    source = None if checkpoint == RANDOM_WEIGHTS else downloads.locate(checkpoint, variant.remote, extra=_EXTRA)
    if source is not None:
        _compare(source, numbers, variant.name)
    vision_state, language_state = split_state(checkpoints.read(source, extra=_EXTRA)) if source else ({}, {})
    graphs = {name: folder / f"{name}.onnx" for name in ("vision", "embedding", "decoder")}
    facts = ExportFacts(
        family="mobilevlm",
        variant=variant.name,
        regions=MOBILEVLM_REGIONS,
        protect=MOBILEVLM_PROTECTION,
        image=CLIP_IMAGE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        vision = Vision(clip(numbers, variant.size[0]), numbers["hidden_size"])
        if source:
            checkpoints.load_weights(vision, vision_state, source=source, name=f"{variant.name} (vision)")
        signature = Signature(inputs=("pixel_values",), outputs=("image_features",))
        images = [(torch.randn(1, 3, *variant.size),)]
        notes = [export_graph(vision, images, graphs["vision"], signature, facts)]
        del vision, vision_state

        language = llama(numbers)
        if source:
            checkpoints.load_weights(language, language_state, source=source, name=f"{variant.name} (language model)")
        del language_state
        layers, heads, width = (numbers[k] for k in ("layers", "heads", "hidden_size"))
        words = numbers["vocabulary"]
        parts = [
            (torch.randint(0, words, (1, a)), torch.randn(1, image, width), torch.randint(0, words, (1, b)))
            for a, image, b in ((3, 5, 4), (2, 9, 6), (0, 0, 1))
        ]
        axes = {
            "before": {1: "before"},
            "image_features": {1: "tokens"},
            "after": {1: "after"},
            "inputs_embeds": {1: "new"},
        }
        signature = Signature(inputs=("before", "image_features", "after"), outputs=("inputs_embeds",), open_axes=axes)
        shaped = _embedding_facts(facts, numbers, variant.size[0])
        notes.append(export_graph(Embedding(language), parts, graphs["embedding"], signature, shaped))
        steps = [example(layers, heads, width, past=p, new=n) for p, n in ((5, 7), (0, 9), (9, 1))]
        decoded = _decoder_facts(facts, numbers)
        notes.append(export_graph(Decoder(language), steps, graphs["decoder"], _signature(layers), decoded))
    write_wiring(folder, {name: path.name for name, path in graphs.items()}, MOBILEVLM_WIRES)
    if source is not None and (source / TOKENIZER_FILE).is_file():
        shutil.copyfile(source / TOKENIZER_FILE, folder / TOKENIZER_FILE)
    else:
        notes.append(f"Copy the checkpoint's {TOKENIZER_FILE} beside the graphs: questions need it.")
    notes += [variant.note, f"Weights: {variant.remote.licence}."]
    told = tuple(note for note in notes if note)
    return Exported(graphs=graphs, wires=MOBILEVLM_WIRES, protect=MOBILEVLM_PROTECTION, notes=told)


def _signature(layers: int) -> Signature:
    cache = [f"{i}.{kind}" for i in range(layers) for kind in ("key", "value")]
    return Signature(
        inputs=("inputs_embeds", "attention_mask", "position_ids", *(f"past.{n}" for n in cache)),
        outputs=("logits", *(f"present.{n}" for n in cache)),
        open_axes={
            "inputs_embeds": {1: "new"},
            "attention_mask": {1: "all"},
            "position_ids": {1: "new"},
            "logits": {1: "new"},
            **{f"past.{n}": {2: "past"} for n in cache},
            **{f"present.{n}": {2: "all"} for n in cache},
        },
    )


def _embedding_facts(facts: ExportFacts, numbers: Mapping[str, Any], side: int) -> ExportFacts:
    """The usual sample is a prompt with an image of `side` pixels in it."""
    tokens = (side // numbers["clip_patch"] // 2) ** 2
    shapes = {
        "before": (1, BEFORE_IMAGE),
        "image_features": (1, tokens, numbers["hidden_size"]),
        "after": (1, PROMPT - BEFORE_IMAGE - tokens),
    }
    return replace(facts, shapes=shapes)


def _decoder_facts(facts: ExportFacts, numbers: Mapping[str, Any]) -> ExportFacts:
    """Logits are the head, the cache is not; the usual sample is a prompt without a past."""
    heads, width = numbers["heads"], numbers["hidden_size"]
    past = (1, heads, 0, width // heads)
    shapes = {"inputs_embeds": (1, PROMPT, width), "attention_mask": (1, PROMPT), "position_ids": (1, PROMPT)}
    names = _signature(numbers["layers"]).inputs[3:]
    return replace(facts, heads=("logits",), shapes={**shapes, **dict.fromkeys(names, past)})


def clip(numbers: Mapping[str, Any], side: int) -> Any:
    """Build the vision tower with random weights, for square images of `side` pixels."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=numbers["clip_hidden_size"],
        intermediate_size=numbers["clip_intermediate_size"],
        num_hidden_layers=numbers["clip_layers"],
        num_attention_heads=numbers["clip_heads"],
        patch_size=numbers["clip_patch"],
        image_size=side,
        hidden_act="quick_gelu",
    )
    config._attn_implementation = "eager"  # fewer nodes: no masks where there is nothing to mask
    return CLIPVisionModel(config)


def llama(numbers: Mapping[str, Any]) -> Any:
    """Build the language model with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=numbers["vocabulary"],
        num_key_value_heads=numbers["heads"],
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **{theirs: numbers[ours] for ours, theirs in FIELDS.items()},
    )
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config)


def _compare(source: Path, numbers: Mapping[str, Any], name: str) -> None:
    """Refuse a folder whose config.json describes another size, before anything large is read."""
    path = source / "config.json"
    if not path.is_file():
        return
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ModelError(f"'{path}' is damaged ({error}). Download it again.") from error
    other = [
        f"{theirs} is {config[theirs]} in place of {numbers[ours]}"
        for ours, theirs in FIELDS.items()
        if theirs in config and config[theirs] != numbers[ours]
    ]
    if other:
        raise ModelError(f"'{source}' is no checkpoint of {name}: {'; '.join(other)}. Check the model's size.")


def _refuse_small_memory(name: str, numbers: Mapping[str, Any]) -> None:
    names = ("vocabulary", "hidden_size", "intermediate_size", "layers")
    words, width, inner, layers = (int(numbers[k]) for k in names)
    needed = PEAK * 4 * (2 * words * width + layers * (4 * width**2 + 3 * width * inner))
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > installed:
        raise ModelError(
            f"Exporting {name} in float32 takes about {needed / 1e9:.0f} GB of memory; this machine has "
            f"{installed / 1e9:.0f} GB. Export it on a larger one."
        )


def _variant(
    size: str,
    measured: tuple[float, float],
    published: dict[str, float],
    numbers: dict[str, int | float | str | tuple[int, ...]],
) -> Variant:
    licence = "Apache-2.0" if size != "7B" else "Apache-2.0; its language model is Vicuna, under the Llama 2 licence"
    return Variant(
        name=f"mobilevlm-v2-{size.lower()}",
        parameters_m=measured[0],
        flops_b=measured[1],
        work="image and a prompt of 256 positions",
        size=(CLIP_SIDE, CLIP_SIDE),
        architecture={**CLIP, **numbers},
        published=Published(accuracy=published, source="https://github.com/Meituan-AutoML/MobileVLM"),
        remote=Remote(
            file="config.json, tokenizer.model, pytorch_model*.bin or *.safetensors",
            hub=f"mtgv/MobileVLM_V2-{size}",
            licence=licence,
        ),
        note="The last layer of CLIP is never used and is not exported.",
    )


def _numbers(hidden: int, inner: int, layers: int, heads: int, positions: int, epsilon: float) -> dict[str, Any]:
    return dict(zip(FIELDS, (hidden, inner, layers, heads, positions, epsilon), strict=True))


def _scores(gqa: float, sqa: float, text: float, pope: float, mme: float, mmb: float) -> dict[str, float]:
    return {"GQA": gqa, "SQA-I": sqa, "TextVQA": text, "POPE": pope, "MME-P": mme, "MMB-dev": mmb}


MOBILEVLM_VARIANTS = (
    _variant(
        "1.7B",
        (1661.523, 1051.086),
        _scores(59.3, 66.7, 52.1, 84.3, 1302.8, 57.7),
        _numbers(2048, 5632, 24, 16, 2048, 1e-6),
    ),
    _variant(
        "3B",
        (3001.675, 1739.256),
        _scores(61.1, 70.0, 57.5, 84.7, 1440.5, 63.2),
        _numbers(2560, 6912, 32, 32, 2048, 1e-6),
    ),
    _variant(
        "7B",
        (7050.345, 3807.387),
        _scores(62.6, 74.8, 62.3, 85.3, 1560.7, 69.2),
        _numbers(4096, 11008, 32, 32, 4096, 1e-5),
    ),
)
MOBILEVLM_SHAPES = Variant(
    name="mobilevlm-shapes",
    parameters_m=1.712512,
    flops_b=0.757747,
    work="image and a prompt of 256 positions",
    size=(96, 96),
    architecture={
        "clip_hidden_size": 128, "clip_intermediate_size": 512, "clip_layers": 5, "clip_heads": 8, "clip_patch": 8,
        "vocabulary": 932, **_numbers(128, 352, 3, 4, 512, 1e-6),
    },
    published=Published(source="reference/README.md"),
    remote=Remote(file="a folder, from reference/train_language.py", licence="Apache-2.0"),
    note="A reduced MobileVLM V2 for the embedded sample.",
)  # fmt: skip
MOBILEVLM = Family(
    name="mobilevlm",
    task="vision-language generation",
    extra=_EXTRA,
    packages={"torch": (2, 6), "transformers": (5, 0)},
    variants={v.name: v for v in MOBILEVLM_VARIANTS},
    export=export_mobilevlm,
    relevance=relevance.mobilevlm,
)
