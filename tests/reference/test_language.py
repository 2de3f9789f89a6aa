"""Training of the language sample: what is asked about one image in one sequence, where heads look, and the layout."""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from bitalloy.model.graphs.outline import read_outline
from bitalloy.model.graphs.wiring import load_program
from bitalloy.runtime.ort import OrtSession
from bitalloy.samples import shapes
from bitalloy.tasks.chat import IMAGE_TOKEN

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

REFERENCE = Path(__file__).resolve().parents[2] / "reference"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REFERENCE))
        yield importlib.import_module("train_language")


@pytest.fixture(scope="module")
def student(script: ModuleType) -> Any:
    torch.manual_seed(0)
    return script.Student().eval()


def batch(script: ModuleType, count: int) -> Any:
    drawn = [shapes.scene(i, size=script.SIDE, split="train") for i in range(count)]
    return importlib.import_module("training").collate(drawn)


def test_answers_in_one_sequence_cost_what_they_cost_alone(script: ModuleType, student: Any) -> None:
    """Every question is put alone, without any mask of ours."""
    scenes, features = batch(script, 2), torch.randn(2, 36, script.NUMBERS["hidden_size"])
    random.seed(3)
    with torch.no_grad():
        polar, other, _, _ = script.answers(student, features, scenes)
    random.seed(3)
    losses: list[list[float]] = [[], []]
    embed = student.language.model.embed_tokens
    for seen, labels, colors in zip(features, scenes.labels.tolist(), scenes.colors.tolist(), strict=True):
        asked = script.asked([v for v in labels if v >= 0], [v for v in colors if v >= 0])
        for found, turns in zip(losses, asked, strict=True):
            for turn in turns:
                at = turn.prompt.index(IMAGE_TOKEN)
                before, after = (torch.tensor(ids) for ids in (turn.prompt[:at], turn.prompt[at + 1 :]))
                rest = torch.cat((after, torch.tensor(turn.answer[:-1], dtype=torch.int64)))
                with torch.no_grad():
                    vectors = torch.cat((embed(before), seen, embed(rest)))[None]
                    logits = student.language(inputs_embeds=vectors).logits[0, -len(turn.answer) :]
                chances = logits.log_softmax(-1)
                found += [-chances[i, token].item() for i, token in enumerate(turn.answer)]
    assert polar.item() == pytest.approx(2 * np.mean(losses[0]), rel=1e-4)
    assert other.item() == pytest.approx(np.mean(losses[1]), rel=1e-4)


def test_as_many_questions_have_the_answer_yes_as_no(script: ModuleType) -> None:
    polar, others = script.asked([0, 3, 0, 5], [1, 2, 3, 4])
    said = [script.chat().tokenizer.decode(t.answer) for t in polar]
    assert sorted(said) == ["no", "no", "yes", "yes"] and len(others) == 1


def test_heads_look_at_their_neighbours_before_training(script: ModuleType, student: Any) -> None:
    """On an image of one colour, in the middle of the grid, by the weights of transformers' own attention."""
    tower = student.vision.vision_tower
    with torch.no_grad():
        looked = tower(torch.zeros(1, 3, script.SIDE, script.SIDE), output_attentions=True).attentions
    grid = script.SIDE // script.PATCH
    row, column = grid // 2, grid // 2
    for layer, far in enumerate(script.REACH):
        places = looked[layer][0, :, 1 + row * grid + column, 1:].argmax(-1).tolist()
        found = {(place // grid - row, place % grid - column) for place in places}
        assert found == {(y * far, x * far) for y in (-1, 0, 1) for x in (-1, 0, 1)} - {(0, 0)}


def test_geometry_is_learned_from_the_scene(script: ModuleType, student: Any) -> None:
    """Layers that say what is true have no loss: two patches of one square, by hand."""
    scenes = batch(script, 1)
    instances = torch.zeros_like(scenes.instances)
    instances[0, 8:16, 8:24] = 1
    scenes = scenes._replace(instances=instances, boxes=torch.tensor([[[8.0, 8.0, 24.0, 16.0]]]))
    grid = script.SIDE // script.PATCH
    inside = torch.zeros(1, grid**2 + 1, 3)
    inside[0, 1 + grid + 1, 0] = inside[0, 1 + grid + 2, 1] = 1
    inside[..., 2] = 1
    heads = torch.nn.Module()
    heads.pixels, heads.boxes = torch.nn.Linear(3, script.PATCH**2, bias=False), torch.nn.Linear(3, 4, bias=False)
    with torch.no_grad():
        heads.pixels.weight[:] = torch.tensor([40.0, 40.0, -20.0])
        heads.boxes.weight.zero_()
        heads.boxes.weight[:, :2] = torch.tensor([[-4.0, -4, 12, 4], [-12, -4, 4, 4]]).T / (script.SIDE / 4)
        outline, extent = script.geometry(heads, [inside] * 4, scenes)
    assert outline.item() < 1e-6 and extent.item() < 1e-6


def test_checkpoints_have_the_published_layout_and_go_through_the_zoo(
    script: ModuleType, student: Any, tmp_path: Path
) -> None:
    state = {"average": student.state_dict(), "images": 0, "seed": 0, "command": "python reference/train_language.py"}
    script.write(state, tmp_path / "program", tmp_path)
    usual = read_outline(tmp_path / "program").shapes()
    assert set(load_program(tmp_path / "program", shapes=usual).graphs) == {"vision", "embedding", "decoder"}
    pixels = torch.randn(1, 3, script.SIDE, script.SIDE)
    with torch.no_grad():
        want = student.vision(pixels).numpy()
    got = OrtSession(tmp_path / "program" / "vision.onnx").run({"pixel_values": pixels.numpy()})["image_features"]
    assert np.abs(got - want).max() < 2e-2 * np.abs(want).max()  # weights are stored as float16


def test_two_optimizers_go_on_from_their_state_as_one(script: ModuleType) -> None:
    """Two runs of three steps end alike, one of them stopped and resumed after the first."""
    training = importlib.import_module("training")
    ends = []
    for stops in (False, True):
        torch.manual_seed(5)
        net = torch.nn.ModuleDict({"layers": torch.nn.ModuleDict({"a": torch.nn.Linear(6, 6)})})
        recipe = training.Recipe(
            build=script.Student, loss=script.loss, stages=(), learning_rate=0.1, final_rate=0.0,
            orthogonal=lambda name: name == "layers.a.weight",
        )  # fmt: skip
        optimizer = training.optimizer_for(net, recipe)
        assert isinstance(optimizer, training.Pair)
        for step in range(3):
            if stops and step == 1:
                state = optimizer.state_dict()
                optimizer = training.optimizer_for(net, recipe)
                optimizer.load_state_dict(state)
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (step + 1)
            optimizer.zero_grad()
            net["layers"]["a"](torch.linspace(-1, 1, 12).view(2, 6)).square().sum().backward()
            optimizer.step()
        ends.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
