"""Jobs about programs: another process opens the folder, the labels and the models of plans again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.core.test_jobs import QUICK, Recording, elsewhere
from tests.small_programs import write_promptable

import bitalloy
from bitalloy.core.errors import ModelError
from bitalloy.core.jobs import perform, residents
from bitalloy.core.work import Workspace
from bitalloy.model.graphs.joining import join
from bitalloy.model.graphs.wiring import GraphProgram, load_program
from bitalloy.pipeline.prepare import prepare
from bitalloy.sensitivity.measuring import measure_exact
from bitalloy.tasks.evaluate import Evaluator


@pytest.mark.parametrize(("program", "labels"), [("promptable", "instances.json"), ("language", "questions.jsonl")])
def test_another_process_gives_the_same_bytes(
    program: str, labels: str, drawn: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    executor = Recording()
    work = Workspace(executor=executor)
    ready = prepare(
        request.getfixturevalue(program), out=tmp_path / "run", data=drawn / labels, evaluate=drawn / labels
    )
    analysis = bitalloy.analyze(ready.model, ready.data, QUICK, work=work)
    measure_exact(analysis, samples=1, work=work)
    evaluator, int8 = Evaluator(analysis, ready.labels, 3, work), analysis.units.lowest_gated()
    evaluator.results({"float": evaluator.reference, "int8": evaluator.subject(int8)}, "evaluate", resamples=10)
    chosen = [executor.of(kind)[-1] for kind in ("calibrate", "probe", "exact", "observed")]
    assert all(residents(job) == () for job, _ in chosen)
    assert elsewhere([job for job, _ in chosen]) == [result for _, result in chosen]


def test_a_changed_graph_is_refused(drawn: Path, tmp_path: Path) -> None:
    folder = write_promptable(tmp_path / "program")
    executor = Recording()
    ready = prepare(folder, out=tmp_path / "run", data=drawn / "images")
    bitalloy.calibrate(ready.model, ready.data, QUICK, work=Workspace(executor=executor))
    ((job, ranges),) = executor.of("calibrate")
    assert perform(job) == ranges
    wires = (folder / "program.json").read_text()
    (folder / "program.json").write_text(wires.replace("image_embeddings", "point_coords"))
    with pytest.raises(ModelError):
        perform(job)
    (folder / "program.json").write_text(wires)
    content = (folder / "encoder.onnx").read_bytes()
    (folder / "encoder.onnx").write_bytes(content.replace(b"image_encoder/1", b"image_encoder/9"))
    with pytest.raises(ModelError, match=r"program.json' has changed since this job was made"):
        perform(job)


def test_a_program_made_in_memory_binds_jobs_to_its_process(promptable: Path, drawn: Path, tmp_path: Path) -> None:
    executor: Any = Recording()
    ready = prepare(promptable, out=tmp_path / "run", data=drawn / "images")
    shapes = {"decoder:point_coords": (1, 2, 2), "decoder:point_labels": (1, 2)}
    loaded = load_program(promptable, shapes=shapes)
    model = join(GraphProgram(loaded.graphs, loaded.wires))
    bitalloy.calibrate(model, ready.data, QUICK, work=Workspace(executor=executor))
    ((job, _),) = executor.of("calibrate")
    assert residents(job) == ("the model 'encoder+decoder'",)
