"""Vision-language: prompts, perplexity, agreement and answers, with toy models that can be counted by hand."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.special import log_softmax
from scipy.stats import entropy

from bitalloy.core.errors import DataError
from bitalloy.core.records import TensorSpec
from bitalloy.data.images import ImageSpec
from bitalloy.tasks.base import Interface, TaskResult
from bitalloy.tasks.bootstrap import resampled_weights
from bitalloy.tasks.captions import QUESTION, WRITTEN, CaptionData
from bitalloy.tasks.chat import IMAGE_TOKEN, Chat, SentencePieces, join_chat, log_probabilities, open_chat
from bitalloy.tasks.greedy import compare_answers, joined_answers
from bitalloy.tasks.language import LANGUAGE
from bitalloy.tasks.questions import LETTER, SHORT, Question, QuestionData, read_answer

INPUTS = (
    TensorSpec(name="pixel_values", dtype="FLOAT", shape=(1, 3, 32, 32)),
    TensorSpec(name="input_ids", dtype="INT64", shape=(1, "s")),
)
OUTPUTS = (TensorSpec(name="logits", dtype="FLOAT", shape=(1, "t", 64)),)
IMAGE_ROWS = 5
"""Positions that the toy models put in the place of the image."""


class Words:
    """A tokenizer with an id for each new word; 0 pads, 1 starts, 2 ends."""

    bos, eos = 1, 2

    def __init__(self) -> None:
        self.words = ["<pad>", "<s>", "</s>"]

    def encode(self, text: str) -> list[int]:
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        return [self.words.index(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.words[i] for i in ids)


class Letters:
    """A tokenizer of single characters that joins a colon and a space; without a start token."""

    bos, eos = None, 3

    def encode(self, text: str) -> list[int]:
        return [ord(c) + 10 for c in text.replace(": ", "\x01")]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i - 10) for i in ids).replace("\x01", ": ")


def interface(tokenizer: Any = None) -> Interface:
    return Interface(inputs=INPUTS, outputs=OUTPUTS, tokenizer=tokenizer or Words())


def expanded(feeds: dict[str, np.ndarray]) -> list[int]:
    """Ids with the image's placeholder replaced by several zeros."""
    (ids,) = feeds["input_ids"].tolist()
    assert ids.count(IMAGE_TOKEN) == 1 and feeds["pixel_values"].shape == (1, 3, 32, 32)
    at = ids.index(IMAGE_TOKEN)
    return [*ids[:at], *[0] * IMAGE_ROWS, *ids[at + 1 :]]


def bigram(table: np.ndarray) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """A model whose next token depends on the last one only; `table` (v, v) holds logits."""
    return lambda feeds: {"logits": table[expanded(feeds)][None]}


def by_name(result: TaskResult, model: str = "float") -> dict[str, float]:
    return {metric.name: metric.values[model].value for metric in result.metrics}


# -- prompt and image -------------------------------------------------------------------------------


def test_prompt_is_that_of_mobilevlm() -> None:
    words = Words()
    chat = open_chat(interface(words))
    ids = chat.prompt("What is this?")
    at = ids.index(IMAGE_TOKEN)
    assert ids[0] == 1 and 1 not in ids[1:]
    before, after = words.decode(ids[1:at]), words.decode(ids[at + 1 :])
    assert before == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER:"
    )
    assert after == "What is this? ASSISTANT:"


def test_answer_tokens_are_what_follows_the_shared_start() -> None:
    chat = open_chat(interface())
    turn = chat.turn("What?", "a red star")
    assert turn.prompt == chat.prompt("What?")
    assert chat.tokenizer.decode(turn.answer[:-1]) == "a red star" and turn.answer[-1] == 2
    letters = Letters()
    chat = open_chat(interface(letters))
    turn = chat.turn("Q", "yes")
    assert chat.prompt("Q")[-1] == ord(":") + 10 and turn.prompt[-1] == ord("T") + 10  # the joined token is predicted
    assert letters.decode(turn.answer[:-1]) == ": yes" and turn.prompt[0] == ord("A") + 10


def test_images_become_squares_on_the_mean_colour() -> None:
    image = Image.new("RGB", (60, 30), (255, 0, 10))
    feed = open_chat(interface()).feed(image)
    assert feed.shape == (1, 3, 32, 32) and feed.dtype == np.float32
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    pixels = feed[0] * np.reshape(std, (3, 1, 1)) * 255 + np.reshape(mean, (3, 1, 1)) * 255
    np.testing.assert_allclose(pixels[:, 16, 16], [255, 0, 10], atol=0.01)
    for row in (0, 31):
        np.testing.assert_allclose(pixels[:, row, 16], [122, 116, 104], atol=0.01)


def test_models_are_known_and_need_a_tokenizer() -> None:
    assert LANGUAGE.matches(interface()) and not LANGUAGE.matches(Interface(inputs=INPUTS[1:], outputs=OUTPUTS))
    with pytest.raises(DataError, match="needs the model's tokenizer"):
        open_chat(Interface(inputs=INPUTS, outputs=OUTPUTS))


def test_log_probabilities(rng: np.random.Generator) -> None:
    logits = rng.normal(0, 30, (1, 7, 11)).astype(np.float32)
    np.testing.assert_allclose(log_probabilities({"y": logits}, 3), log_softmax(logits[0, 4:], axis=1), atol=1e-4)
    logits[0, 6] = np.nan
    logits[0, 5, 3] = np.inf
    found = log_probabilities({"y": logits}, 2)
    np.testing.assert_allclose(found[1], -math.log(11))
    assert found[0].argmax() == 3 and np.isfinite(found).all()
    with pytest.raises(DataError, match=r"\[1, 7, 11\]; expected logits .* at least 8 positions"):
        log_probabilities({"y": logits}, 8)


# -- three graphs as one ----------------------------------------------------------------------------


class ThreeGraphs:
    """A tiny decoder whose logits depend on all embeddings so far, kept as keys; counts what it is asked."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.table, self.head = rng.normal(size=(64, 6)), rng.normal(size=(6, 64))
        self.seen: list[tuple[str, int]] = []

    def vision(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.seen.append(("vision", 1))
        return {"image_features": np.full((1, IMAGE_ROWS, 6), feeds["pixel_values"].mean())}

    def embed(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        parts = [self.table[feeds["before"]], feeds["image_features"], self.table[feeds["after"]]]
        return {"inputs_embeds": np.concatenate(parts, axis=1)}

    def decode(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        new = feeds["inputs_embeds"]
        past, count = feeds["past.0.key"].shape[2], new.shape[1]
        assert feeds["attention_mask"].shape == (1, past + count) and (feeds["attention_mask"] == 1).all()
        assert feeds["position_ids"].tolist() == [list(range(past, past + count))]
        self.seen.append(("decode", count))
        every = np.concatenate([feeds["past.0.key"], new.reshape(1, count, 2, 3).transpose(0, 2, 1, 3)], axis=2)
        rows = every.transpose(0, 2, 1, 3).reshape(1, -1, 6)
        states = np.tanh(rows.cumsum(axis=1)) + np.arange(rows.shape[1])[:, None] / 50
        return {
            "logits": (states @ self.head)[:, past:],
            "present.0.key": every,
            "present.0.value": feeds["past.0.value"],
        }

    def run(self) -> Any:
        return join_chat(self.vision, self.embed, self.decode, (1, 2, 3))


def test_joined_graphs_use_what_they_know_and_give_the_same(rng: np.random.Generator) -> None:
    graphs = ThreeGraphs(rng)
    kept = graphs.run()
    first, second = rng.normal(size=(2, 1, 3, 32, 32))
    start = [1, 7, IMAGE_TOKEN, 9, 8]
    asked = [
        (first, start),
        (first, [*start, 11]),  # goes on
        (first, [*start, 11, 12, 13]),
        (first, [*start, 20]),  # another end
        (first, [*start, 20]),  # nothing new
        (second, [*start, 20, 21]),  # another image
        (first, [*start, 20, 21]),
    ]
    for image, ids in asked:
        feeds = {"pixel_values": image, "input_ids": np.array([ids])}
        found = kept(dict(feeds))["logits"]
        fresh = ThreeGraphs(np.random.default_rng(0)).run()
        assert found.shape == (1, len(ids) - 1 + IMAGE_ROWS, 64)
        np.testing.assert_allclose(found, fresh(dict(feeds))["logits"])
    counts = [count for graph, count in graphs.seen if graph == "decode"]
    whole = len(start) - 1 + IMAGE_ROWS
    assert counts == [whole, 1, 2, whole + 1, whole + 1, whole + 2, whole + 2]
    assert sum(graph == "vision" for graph, _ in graphs.seen) == 3


def test_an_answer_costs_one_step_a_token(rng: np.random.Generator) -> None:
    graphs = ThreeGraphs(rng)
    letters = Letters()
    chat = Chat(letters, ImageSpec(input="pixel_values", height=32, width=32), "x<image>{question}")
    image = chat.feed(Image.new("RGB", (8, 8)))
    graphs.table, graphs.head = rng.normal(size=(200, 6)), rng.normal(size=(6, 200))
    slow = ThreeGraphs(rng)
    slow.table, slow.head = graphs.table, graphs.head
    answer = chat.answer(graphs.run(), image, "Q", limit=6)
    assert answer == chat.answer(lambda feeds: slow.run()(feeds), image, "Q", limit=6)
    assert [c for g, c in graphs.seen if g == "decode"][1:] == [1] * 5


def test_sentencepiece_tokenizers(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    text = tmp_path / "text.txt"
    text.write_text("a red star and a blue ring\nASSISTANT: USER: what is in the image?\n" * 30)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=60,
        hard_vocab_limit=False,
        bos_id=1,
        eos_id=2,
        unk_id=0,
    )
    pieces = SentencePieces(sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")))
    assert (pieces.bos, pieces.eos) == (1, 2)
    chat = open_chat(interface(pieces))
    turn = chat.turn("what is in the image?", "a red star")
    assert turn.prompt == chat.prompt("what is in the image?")
    assert pieces.decode((*turn.answer[:-1], 31999)) == "a red star" and turn.answer[-1] == 2


# -- captions ---------------------------------------------------------------------------------------


def caption_folder(folder: Path, captions: dict[str, list[str]]) -> Path:
    """COCO's layout: captions beside `images`."""
    (folder / "images").mkdir(parents=True)
    content: dict[str, Any] = {"images": [], "annotations": []}
    for number, (name, texts) in enumerate(captions.items()):
        Image.new("RGB", (40, 30), (number * 20, 0, 0)).save(folder / "images" / name)
        content["images"].append({"id": 90 - number, "file_name": name, "width": 40, "height": 30})
        content["annotations"] += [{"id": 0, "image_id": 90 - number, "caption": text} for text in texts]
    (folder / "captions.json").write_text(json.dumps(content))
    return folder / "captions.json"


def test_perplexity_and_agreement_equal_a_count_by_hand(tmp_path: Path, rng: np.random.Generator) -> None:
    texts = {"a.png": ["one red star", "a star\n "], "b.png": ["two blue rings and a cross"], "c.png": []}
    words = Words()
    data = LANGUAGE.open(caption_folder(tmp_path, texts), interface(words))
    assert isinstance(data, CaptionData) and [name for name, _ in data.captions] == ["b.png", "a.png"]
    first, second = rng.normal(0, 2, (2, 64, 64))
    second = first + 0.3 * second
    told: list[int] = []
    result = LANGUAGE.evaluate({"float": bigram(first), "int8": bigram(second)}, data, progress=told.append)
    tables = {"float": log_softmax(first, axis=1), "int8": log_softmax(second, axis=1)}
    losses: dict[str, list[float]] = {"float": [], "int8": []}
    same, divergence = [], []
    for caption in ("one red star", "a star", "two blue rings and a cross"):
        ids = [*words.encode("ASSISTANT: " + caption), 2]
        for last, following in itertools.pairwise(ids):
            for name, table in tables.items():
                losses[name].append(-table[last, following])
            same.append(tables["float"][last].argmax() == tables["int8"][last].argmax())
            divergence.append(entropy(np.exp(tables["float"][last]), np.exp(tables["int8"][last])))
    assert len(same) == 14 and result.notes[0] == "14 tokens of captions on 2 images." and sum(told) == 4
    known = {name: value for name, value in by_name(result).items() if "caption" not in name}
    assert known == pytest.approx(
        {"perplexity": math.exp(np.mean(losses["float"])), "top-1 agreement": 1, "KL divergence": 0}
    )
    known = {name: value for name, value in by_name(result, "int8").items() if "caption" not in name}
    assert known == pytest.approx(
        {
            "perplexity": math.exp(np.mean(losses["int8"])),
            "top-1 agreement": np.mean(same),
            "KL divergence": np.mean(divergence),
        }
    )
    assert not result.metrics[0].higher_is_better
    worse = result.metrics[2].drops["int8"]
    assert worse.value == pytest.approx(np.mean(divergence)) and worse.low > 0


@pytest.mark.parametrize("changed", [0, 1, 3, 4, None])
def test_the_first_divergent_token_is_where_the_logits_were_changed(tmp_path: Path, changed: int | None) -> None:
    """A chain of tokens, one after the other; the second model leaves it at a known place, the end included."""
    words = Words()
    data = LANGUAGE.open(caption_folder(tmp_path, {"a.png": ["one star"], "b.png": ["a ring"]}), interface(words))
    start, *chain, end = *words.encode("ASSISTANT: four words are written"), words.eos
    assert len(chain) == 4
    table = np.zeros((64, 64))
    for last, following in itertools.pairwise((start, *chain, end)):
        table[last, following] = 5
    other = table.copy()
    if changed is not None:
        other[(start, *chain)[changed]] = np.eye(64)[words.encode("elsewhere")[0]] * 9
    result = LANGUAGE.evaluate({"float": bigram(table), "int8": bigram(other)}, data)
    same, token = result.metrics[3:]
    assert (same.name, token.name) == ("greedy caption agreement", "first divergent caption token")
    assert (same.values["float"].value, token.values["float"].value) == (1, 5)
    assert same.values["int8"].value == float(changed is None) and same.values["int8"].n == 2
    assert token.values["int8"].value == (5 if changed is None else changed)
    assert token.drops["int8"].value == 5 - token.values["int8"].value


def test_intervals_of_divergent_tokens_draw_images(tmp_path: Path) -> None:
    """One of two answers differs at once: resamples lie between none and all."""
    answers = {"float": [(5, 2), (7, 8, 2)], "int8": [(5, 2), (9, 8, 2)]}
    seen = {name: [joined_answers([one]) for one in some] for name, some in answers.items()}
    same, token = compare_answers(seen, "caption", resampled_weights(2, 200, 0))
    assert same.values["int8"].value == 0.5 and (same.values["int8"].low, same.values["int8"].high) == (0, 1)
    assert token.values["int8"].value == 1 and token.values["float"].value == 2.5
    assert (token.values["int8"].low, token.values["int8"].high) == (0, 2)
    assert token.drops["int8"].value == 1.5


def test_a_written_caption_is_cut_at_its_limit(tmp_path: Path, rng: np.random.Generator) -> None:
    graphs = ThreeGraphs(rng)
    graphs.head[:, Words.eos] = -1e9  # it never ends
    data = LANGUAGE.open(caption_folder(tmp_path, {"a.png": ["one star"]}), interface())
    found = LANGUAGE.alone(graphs.run(), data, 0)
    assert found["greedy"].shape == (WRITTEN,) and found["lengths"].tolist() == [WRITTEN]
    assert [count for graph, count in graphs.seen if graph == "decode"][1:] == [1] * (WRITTEN - 1)


def test_captions_in_cocos_own_layout(tmp_path: Path) -> None:
    source = caption_folder(tmp_path / "flat", {"a.png": ["one star"]})
    (tmp_path / "coco/annotations").mkdir(parents=True)
    source.rename(tmp_path / "coco/annotations/captions_val2017.json")
    (tmp_path / "flat/images").rename(tmp_path / "coco/val2017")
    data = LANGUAGE.open(tmp_path / "coco/annotations/captions_val2017.json", interface())
    assert isinstance(data, CaptionData) and data.folder == tmp_path / "coco/val2017"


def test_no_knowledge_has_the_perplexity_of_the_vocabulary(real: Path) -> None:
    data = LANGUAGE.open(real / "coco-val-94/captions.json", interface())
    assert isinstance(data, CaptionData) and len(data.captions) == 34
    assert sum(len(texts) for _, texts in data.captions) == 170

    def uniform(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"logits": np.zeros((1, len(expanded(feeds)), 5000), np.float32)}

    result = LANGUAGE.evaluate({"float": uniform, "int8": uniform}, data, limit=6, seed=1)
    perplexity = result.metrics[0]
    assert perplexity.values["int8"].value == pytest.approx(5000) and perplexity.values["int8"].n == 6
    assert perplexity.drops["int8"].value == 0 and by_name(result, "int8")["KL divergence"] == 0


def test_a_broken_model_still_has_a_number(tmp_path: Path) -> None:
    data = LANGUAGE.open(caption_folder(tmp_path, {"a.png": ["one star"]}), interface())
    wrong = np.full((64, 64), -1e9)
    wrong[:, 0] = 1e9
    nan = np.full((64, 64), np.nan)
    result = LANGUAGE.evaluate({"float": bigram(nan), "int8": bigram(wrong)}, data)
    assert by_name(result)["perplexity"] == pytest.approx(64)
    assert by_name(result, "int8")["perplexity"] == pytest.approx(math.exp(100))
    assert all(math.isfinite(v) for model in ("float", "int8") for v in by_name(result, model).values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no COCO caption file"),
        ({"images": [], "annotations": []}, "has 0 images and no caption"),
        ({"images": [{"id": 1, "file_name": "a.png"}], "annotations": []}, "has 1 images and no caption"),
        (
            {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 2, "caption": "x"}]},
            "caption 'x' for image 2",
        ),
        (
            {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": " "}]},
            "expected some text",
        ),
        (
            {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "x"}]},
            "None of the 1 images",
        ),
    ],
)
def test_broken_caption_files(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "captions.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=message):
        LANGUAGE.open(path, interface())
    with pytest.raises(DataError, match="Cannot read the captions"):
        LANGUAGE.open(tmp_path / "absent.json", interface())


# -- questions --------------------------------------------------------------------------------------


class Scripted:
    """Answers by question, token after token, then ends."""

    def __init__(self, words: Words, answers: dict[str, str]) -> None:
        self.words, self.answers, self.calls = words, answers, 0

    def __call__(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.calls += 1
        ids = expanded(feeds)
        text = self.words.decode([i for i in ids if i > 2])
        (question,) = (q for q in self.answers if q in text)
        said = self.words.encode(text.split("ASSISTANT:")[1])
        script = [*self.words.encode(self.answers[question]), 2]
        logits = np.zeros((1, len(ids), 500), np.float32)
        logits[0, -1, script[len(said)] if len(said) < len(script) else 2] = 5
        return {"logits": logits}


def question_file(folder: Path, lines: Sequence[Any]) -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 30)).save(folder / "images" / name)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "questions.jsonl").write_text(text)
    return folder / "questions.jsonl"


LINES = [
    {"question_id": 1, "image": "a.png", "text": "Is there a dog?", "label": "yes"},
    {"image": "a.png", "question": "Is there a cat?", "answer": "No."},
    "",
    {"image": "b.png", "question": "Is it night?", "answer": "no"},
    {"image": "b.png", "question": "How many are there?", "answer": "Three"},
    {"image": "b.png", "question": "Which colour?", "answer": "blue", "choices": ["red", "blue"]},
    {"image": "a.png", "question": "Which size?", "answer": 2, "choices": ["small", "middle", "large"]},
    {"image": "a.png", "question": "Which form?", "answer": "A", "choices": ["round", "flat"]},
]


def test_answers_are_generated_read_and_counted(tmp_path: Path) -> None:
    words = Words()
    data = LANGUAGE.open(question_file(tmp_path, LINES), interface(words))
    assert isinstance(data, QuestionData) and [q.answer for q in data.questions] == [
        "yes", "no", "no", "three", "B", "C", "A",
    ]  # fmt: skip
    good = {
        "Is there a dog?": "Yes, there is a dog",
        "Is there a cat?": "No",
        "Is it night?": "It is not night. Yes",
        "How many are there?": "three.",
        "Which colour?": "B. blue",
        "Which size?": "Large.",
        "Which form?": "The answer is A",
    }
    bad = good | {
        "Is there a cat?": "yes",
        "Is it night?": "It is",
        "How many are there?": "four",
        "Which form?": "B",
    }
    told: list[int] = []
    models = {"float": Scripted(words, good), "int8": Scripted(words, bad)}
    result = LANGUAGE.evaluate(models, data, progress=told.append)
    names = ["yes/no accuracy", "yes/no F1", "choice accuracy", "exact match", "answer agreement"]
    names += ["greedy answer agreement", "first divergent answer token"]
    # tokens are words and the end; of four answers that differ one shares "It is", the others share nothing
    length = (6 + 2 + 6 + 2 + 3 + 2 + 5) / 7
    assert by_name(result) == pytest.approx({**dict.fromkeys(names, 1.0), names[-1]: length}) and sum(told) == 4
    expected = [1 / 3, 2 * 1 / (2 * 1 + 2 + 0), 2 / 3, 0, 3 / 7, 3 / 7, (6 + 0 + 2 + 0 + 3 + 2 + 0) / 7]
    assert by_name(result, "int8") == pytest.approx(dict(zip(names, expected, strict=True)))
    assert result.notes[0] == "7 questions on 2 images." and result.metrics[0].values["float"].n == 2
    assert models["float"].calls == sum(len(answer.split()) + 1 for answer in good.values())


def test_generation_stops_at_its_limit() -> None:
    words = Words()
    chat = open_chat(interface(words))
    image = chat.feed(Image.new("RGB", (8, 8)))
    endless = Scripted(words, {"Go?": " ".join(["on"] * 100)})
    assert chat.answer(endless, image, "Go?", limit=4) == "on on on on" and endless.calls == 4


def test_prompts_say_how_to_answer() -> None:
    assert Question("a", "Is it?", "yes", "yes/no").prompt() == f"Is it?\n{SHORT}"
    choice = Question("a", "Which?", "B", "choice", ("red", "blue"))
    assert choice.prompt() == f"Which?\nA. red\nB. blue\n{LETTER}"


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("Yes", "yes/no", "yes"),
        ("no, there is none", "yes/no", "no"),
        ("There is not. Yes", "yes/no", "no"),
        ("Nothing", "yes/no", "yes"),  # as POPE counts
        ("", "yes/no", "yes"),
        ("B", "choice", "B"),
        ("(B) blue", "choice", "B"),
        ("B: blue", "choice", "B"),
        ("Blue", "choice", "B"),
        ("The answer is B.", "choice", "B"),
        ("Bad", "choice", "?"),
        ("D", "choice", "?"),
        ("A big one", "choice", "A"),
        ("", "choice", "?"),
        (" Two  Dogs. ", "open", "two dogs"),
    ],
)
def test_reading_answers(text: str, kind: Any, expected: str) -> None:
    choices = ("red", "blue", "green") if kind == "choice" else ()
    assert read_answer(text, Question("a", "?", "", kind, choices)) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "truncated"),
        ("[1]", "Expected `object`"),
        ({"question": "Is it?", "answer": "yes"}, "missing required field `image`"),
        ({"image": "a.png", "answer": "yes"}, "needs a `question`"),
        ({"image": "a.png", "question": "Is it?"}, "needs a `question`.* and an `answer`"),
        ({"image": "a.png", "question": "Is it?", "answer": " "}, "and an `answer`"),
        ({"image": "a.png", "question": "?", "answer": "C", "choices": ["x", "y"]}, "'C' is none of AB"),
        ({"image": "a.png", "question": "?", "answer": 2, "choices": ["x", "y"]}, "2 is none of AB"),
        ({"image": "a.png", "question": "?", "answer": "A", "choices": ["x"]}, "1 choices; expected 2 to 10"),
    ],
)
def test_broken_lines_have_their_number(tmp_path: Path, line: Any, message: str) -> None:
    path = question_file(tmp_path, [*LINES[:3], line, LINES[4]])
    with pytest.raises(DataError, match=f"Line 4 of .*questions.jsonl.*{message}"):
        LANGUAGE.open(path, interface())


def test_popes_own_files_are_lines_whatever_their_name(tmp_path: Path) -> None:
    path = question_file(tmp_path, [LINES[0], LINES[0]]).rename(tmp_path / "coco_pope_random.json")
    data = LANGUAGE.open(path, interface())
    assert isinstance(data, QuestionData) and [q.text for q in data.questions] == ["Is there a dog?"] * 2


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 of 2 images .* the first is 'z\.png'"):
        LANGUAGE.open(question_file(tmp_path, [LINES[0], {**LINES[0], "image": "z.png"}]), interface())  # type: ignore[dict-item]
    with pytest.raises(DataError, match="has no questions"):
        LANGUAGE.open(question_file(tmp_path, ["", " "]), interface())
    with pytest.raises(DataError, match="Cannot read the questions"):
        LANGUAGE.open(tmp_path / "absent.jsonl", interface())
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is no UTF-8 text"):
        LANGUAGE.open(tmp_path / "binary.jsonl", interface())


def test_the_embedded_sample_has_captions_and_questions(shapes: Path) -> None:
    words = Words()
    questions = LANGUAGE.open(shapes / "questions.jsonl", interface(words))
    assert isinstance(questions, QuestionData)
    truth = {q.text + q.image: q.answer for q in questions.questions}
    by_pixels = {
        open_chat(interface(words)).feed(Image.open(shapes / "images" / q.image)).tobytes(): q.image
        for q in questions.questions
    }

    def knowing(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        text = words.decode([i for i in expanded(feeds) if i > 2])
        image = by_pixels[feeds["pixel_values"].tobytes()]
        (answer,) = {a for key, a in truth.items() if key.endswith(image) and key.removesuffix(image) in text}
        done = not text.endswith("ASSISTANT:")
        logits = np.zeros((1, len(expanded(feeds)), 500), np.float32)
        logits[0, -1, 2 if done else words.encode(answer)[0]] = 1
        return {"logits": logits}

    result = LANGUAGE.evaluate({"float": knowing}, questions)
    found = by_name(result)
    assert found.pop("first divergent answer token") == 2  # a word and the end
    assert set(found.values()) == {1.0} and len(result.metrics) == 7
    captions = LANGUAGE.open(shapes / "captions.json", interface(words))
    assert isinstance(captions, CaptionData) and len(captions.captions) == 6


def test_question_is_one_of_captions() -> None:
    chat = Chat(Words(), ImageSpec(input="pixel_values", height=32, width=32), "<image> {question}")
    assert chat.tokenizer.decode(chat.turn(QUESTION, "a star").prompt[2:]) == QUESTION
