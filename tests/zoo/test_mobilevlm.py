"""MobileVLM V2, on a small network of its architecture with the published tensor names."""

from __future__ import annotations

import json
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from bitalloy import zoo
from bitalloy.core.errors import ModelError
from bitalloy.model import load as graph
from bitalloy.model.regions import path_of, region_id
from bitalloy.zoo import mobilevlm, mobilevlm_chat
from bitalloy.zoo.base import Exported, Options

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LAYERS, HEADS, WIDTH, INNER = 2, 4, 64, 96
TINY = replace(
    mobilevlm.MOBILEVLM_VARIANTS[0],
    name="tiny",
    architecture={
        "clip_hidden_size": 32, "clip_intermediate_size": 48, "clip_layers": 3, "clip_heads": 2, "clip_patch": 14,
        "hidden_size": WIDTH, "intermediate_size": INNER, "layers": LAYERS, "heads": HEADS, "positions": 512,
        "epsilon": 1e-6, "vocabulary": 32000,
    },
)  # fmt: skip


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any, dict[str, Any]]:
    """CLIP and Llama of transformers, and the projector as tensors."""
    torch.manual_seed(0)
    clip = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=336,
            patch_size=14, hidden_act="quick_gelu",
        )
    ).eval()  # fmt: skip
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32000, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=512, rms_norm_eps=1e-6,
            tie_word_embeddings=False, initializer_range=0.5,
        )
    ).eval()  # fmt: skip
    shapes = {
        "mlp.mlp.0.weight": (WIDTH, 32), "mlp.mlp.0.bias": (WIDTH,), "mlp.mlp.2.weight": (WIDTH, WIDTH),
        "mlp.mlp.2.bias": (WIDTH,), "peg.peg.0.weight": (WIDTH, 1, 3, 3), "peg.peg.0.bias": (WIDTH,),
    }  # fmt: skip
    return clip, llama, {k: 0.1 * torch.randn(s) for k, s in shapes.items()}


@pytest.fixture(scope="module")
def published(parts: tuple[Any, Any, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as on the hub: the layout that the published package saves, with the old names of CLIP."""
    clip, llama, projector = parts
    state = dict(llama.state_dict())
    state |= {f"model.vision_tower.vision_tower.vision_model.{k}": v for k, v in clip.state_dict().items()}
    state |= {f"model.mm_projector.{k}": v for k, v in projector.items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)  # as older versions stored
    folder = tmp_path_factory.mktemp("published")
    torch.save(state, folder / "pytorch_model.bin")
    config = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "rms_norm_eps": 1e-6}
    (folder / "config.json").write_text(json.dumps({"model_type": "mobilevlm", **config}))
    return folder


@pytest.fixture(scope="module")
def exported(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return mobilevlm.export_mobilevlm(TINY, published, Options(), tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="module")
def features(parts: tuple[Any, Any, dict[str, Any]]) -> tuple[Any, Any]:
    """Pixels and their image tokens, computed from the published description with torch's functions."""
    functional = torch.nn.functional
    clip, _, p = parts
    pixels = torch.randn(1, 3, 336, 336)
    with torch.no_grad():
        x = clip(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        x = functional.gelu(functional.linear(x, p["mlp.mlp.0.weight"], p["mlp.mlp.0.bias"]))
        x = functional.linear(x, p["mlp.mlp.2.weight"], p["mlp.mlp.2.bias"])
        x = functional.adaptive_avg_pool2d(x.permute(0, 2, 1).reshape(1, WIDTH, 24, 24), 12)
        x = x + functional.conv2d(x, p["peg.peg.0.weight"], p["peg.peg.0.bias"], padding=1, groups=WIDTH)
    return pixels, x.reshape(1, WIDTH, 144).permute(0, 2, 1)


def test_vision_gives_the_144_tokens_of_the_published_description(
    exported: Exported, features: tuple[Any, Any], onnx_run: Any
) -> None:
    pixels, want = features
    got = onnx_run(exported.graphs["vision"], {"pixel_values": pixels.numpy()})["image_features"]
    assert got.shape == (1, 144, WIDTH)
    assert np.abs(got - want.numpy()).max() <= 1e-4 * float(want.abs().max())


def test_greedy_generation_through_the_graphs_equals_that_of_transformers(
    exported: Exported, parts: tuple[Any, Any, dict[str, Any]], features: tuple[Any, Any]
) -> None:
    _, llama, _ = parts
    pixels, tokens = features
    before, after = torch.tensor([[1, 319, 13563]]), torch.tensor([[29871, 13, 3750, 9047]])
    embed = llama.model.embed_tokens
    with torch.no_grad():
        prompt = torch.cat([embed(before), tokens, embed(after)], 1)
        mask = torch.ones(prompt.shape[:2], dtype=torch.int64)
        want = llama.generate(
            inputs_embeds=prompt,
            attention_mask=mask,
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0].tolist()
    sessions = {n: ort.InferenceSession(str(p), providers=["CPUExecutionProvider"]) for n, p in exported.graphs.items()}

    def run(name: str, feeds: Any) -> dict[str, np.ndarray]:
        names = [o.name for o in sessions[name].get_outputs()]
        return dict(zip(names, sessions[name].run(None, dict(feeds)), strict=True))

    given = (run, pixels.numpy(), before.numpy(), after.numpy())
    cache = mobilevlm_chat.variant_cache_size(TINY)
    got = mobilevlm_chat.generate(*given, cache=cache, limit=12, end=None)
    assert got == want and len(set(want)) > 3
    assert mobilevlm_chat.generate(*given, cache=cache, limit=12, end=want[5]) == want[: want.index(want[5])]
    assert mobilevlm_chat.generate(*given, cache=cache, limit=3, end=None) == want[:3]


def test_program_leads_from_the_image_to_the_logits(exported: Exported) -> None:
    folder = exported.graphs["vision"].parent
    program = json.loads((folder / "program.json").read_text())
    assert program["wires"] == [
        "vision:image_features -> embedding:image_features",
        "embedding:inputs_embeds -> decoder:inputs_embeds",
    ]
    specs = {
        n: ort.InferenceSession(str(folder / f), providers=["CPUExecutionProvider"])
        for n, f in program["graphs"].items()
    }
    for wire in program["wires"]:
        (a, out), (b, into) = (end.split(":") for end in wire.split(" -> "))
        assert out in {o.name for o in specs[a].get_outputs()} and into in {i.name for i in specs[b].get_inputs()}


def test_regions_heads_and_protected_parts(exported: Exported) -> None:
    past = {f"past.{i}.{k}": (1, HEADS, 3, WIDTH // HEADS) for i in range(LAYERS) for k in ("key", "value")}
    shapes = {"inputs_embeds": (1, 5, WIDTH), "attention_mask": (1, 8), "position_ids": (1, 5), **past}
    loaded = graph.load_graph(exported.graphs["decoder"], shapes=shapes)
    regions = {str(n.name): region_id(path_of(n)) for n in loaded.nodes}
    assert regions["/model/layers.1/self_attn/q_proj/MatMul"] == "LM/layer 1/attention/q_proj"
    assert regions["/model/layers.0/mlp/down_proj/MatMul"] == "LM/layer 0/MLP/down_proj"
    assert regions["/lm_head/MatMul"] == "LM/head"
    assert json.loads(loaded.metadata["bitalloy.heads"]) == ["logits"]
    assert [n for n in regions if any(fnmatchcase(n, p.pattern) for p in mobilevlm.MOBILEVLM_PROTECTION)] == [
        "/lm_head/MatMul"
    ]
    vision = {region_id(path_of(n)) for n in graph.load_graph(exported.graphs["vision"]).nodes}
    assert {
        "vision tower/layer 0/attention/q_proj",
        "vision tower/layer 1/MLP/fc1",
        "projector/peg/peg/peg.0",
    } <= vision
    assert not any(r.startswith("vision tower/layer 2") for r in vision)  # the last layer is never used


def test_usual_shapes_in_the_files_fit_each_other(exported: Exported) -> None:
    import onnx

    shapes = {}
    for name, path in exported.graphs.items():
        texts = {p.key: p.value for p in onnx.load(path).metadata_props}
        shapes[name] = json.loads(texts["bitalloy.shapes"])
    spliced = sum(shapes["embedding"][k][1] for k in ("before", "image_features", "after"))
    assert spliced == shapes["decoder"]["inputs_embeds"][1] == shapes["decoder"]["attention_mask"][1] == 256


def test_folder_of_another_size_is_refused_before_it_is_read(published: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no checkpoint of mobilevlm-v2-1\.7b: hidden_size is 64 in place of 2048"):
        zoo.export_model("mobilevlm-v2-1.7b", checkpoint=published, folder=tmp_path)


def test_tensors_that_differ_are_named(published: Path, tmp_path: Path) -> None:
    state = torch.load(published / "pytorch_model.bin", weights_only=True)
    state.pop("model.mm_projector.peg.peg.0.bias")
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(ModelError, match=r"1 missing \(mm_projector\.peg\.peg\.0\.bias\)"):
        mobilevlm.export_mobilevlm(TINY, tmp_path / "bad.pt", Options(), tmp_path)


def test_model_that_does_not_fit_into_memory_is_refused_at_once(tmp_path: Path) -> None:
    huge = replace(TINY, architecture={**TINY.architecture, "hidden_size": 65536, "layers": 200})
    with pytest.raises(ModelError, match="GB of memory"):
        mobilevlm.export_mobilevlm(huge, "random", Options(), tmp_path)


# -- text --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer with Llama's special tokens."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("tokenizer")
    text = folder / "text.txt"
    text.write_text(
        "\n".join(["".join(mobilevlm_chat.prompt(q)) for q in ("What is this?", "How many dogs are there?")] * 20)
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=360, model_type="bpe", byte_fallback=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, normalization_rule_name="identity", minloglevel=2,
        remove_extra_whitespaces=False,
    )  # fmt: skip
    return folder


def test_tokens_are_those_of_the_tokenizer_of_transformers(pieces: Path) -> None:
    """Each half of the prompt alone, as the published code does; the first starts with `<s>`, the second does not."""
    theirs = transformers.LlamaTokenizer.from_pretrained(pieces, legacy=True)
    before, after = mobilevlm_chat.tokenize("How many dogs are there?", mobilevlm_chat.sentence_pieces(pieces))
    first, second = mobilevlm_chat.prompt("How many dogs are there?")
    assert before[0].tolist() == [1, *theirs(first, add_special_tokens=False).input_ids]
    assert after[0].tolist() == theirs(second, add_special_tokens=False).input_ids
    assert before.dtype == after.dtype == np.int64


def test_prompt_is_the_published_conversation() -> None:
    assert "<image>".join(mobilevlm_chat.prompt("Why?")) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhy? ASSISTANT:"
    )


def test_missing_and_damaged_tokenizers_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    with pytest.raises(ModelError, match="No tokenizer"):
        mobilevlm_chat.sentence_pieces(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="is no SentencePiece model"):
        mobilevlm_chat.sentence_pieces(tmp_path)
