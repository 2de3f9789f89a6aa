"""The study: its file, its cells, the damage of parts on one scale, and the questions answered."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import msgspec
import numpy as np
import pytest
from tests.core.test_jobs import Recording

import bitalloy
from bitalloy import zoo
from bitalloy.core.errors import BitalloyError
from bitalloy.core.plans import Budget
from bitalloy.core.records import Estimate
from bitalloy.core.studies import PartContrast, PartDamage, StudyResult, answer_verdict
from bitalloy.core.work import Silent
from bitalloy.pipeline.prepare import RunOptions
from bitalloy.pipeline.study import lacks_of, read_study, study
from bitalloy.report.answers import answer_all
from bitalloy.report.damages import MOST_SENSITIVE
from bitalloy.report.study import heat_map
from bitalloy.search.planning import read_tables
from bitalloy.sensitivity.parts import Effects, operator_kind, top_regions
from bitalloy.targets.placement import rounded

SHIPPED = Path(__file__).parents[2] / "studies" / "models-to-test.toml"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def small_study(inputs: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyResult, Path, Path]:
    """A study of a classifier and of a model that fails, under two budgets."""
    folder = tmp_path_factory.mktemp("study")
    file = write(
        folder / "study.toml",
        f"""
        targets = ["ort-cpu"]
        [schemes]
        usual = []
        eight = ["int8"]
        [budget.fast]
        latency = "0.9x"
        [budget.faithful]
        min-sqnr-db = 10.0
        [[model]]
        name = "classifier"
        model = "{inputs.classifier}"
        data = "{inputs.images}"
        [[model]]
        name = "absent"
        model = "nowhere.onnx"
        where = "Ask a colleague."
        """,
    )
    executor = Recording()
    result = study(file, out=folder / "out", options=RunOptions(executor=executor, progress=Silent()))
    assert executor.of("calibrate") and executor.of("probe")
    return result, folder / "out", file


def test_every_cell_is_a_run_directory(small_study: tuple[StudyResult, Path, Path]) -> None:
    result, out, _ = small_study
    assert [cell.id for cell in result.cells] == [
        f"classifier/ort-cpu/{schemes}/{budget}" for schemes in ("usual", "eight") for budget in ("fast", "faithful")
    ]
    done = [cell for cell in result.cells if not cell.failed]
    assert any(cell.budget == "faithful" for cell in done)
    for cell in done:
        summary = json.loads((out / cell.folder / "summary.json").read_text())
        mixed = cell.variants[-1]
        assert mixed.name == "mixed" and mixed.size_bytes == summary["size_bytes"]["mixed"]
        assert (out / cell.folder / "report.html").is_file()
        bitalloy.plan_again(out / cell.folder, Budget(min_sqnr_db=5.0))


def test_what_is_not_here_is_left_out_and_said(small_study: tuple[StudyResult, Path, Path]) -> None:
    result, out, file = small_study
    assert [lack.model for lack in result.lacks] == ["absent"]
    assert "nowhere.onnx" in result.lacks[0].what and "Ask a colleague." in result.lacks[0].what
    page = (out / "study.html").read_text()
    assert "Ask a colleague." in page and "<script" not in page
    assert lacks_of(read_study(file)) == result.lacks


def test_answers_link_to_rows_of_the_page(small_study: tuple[StudyResult, Path, Path]) -> None:
    """Every row that an answer names stands in the page, under a name without blanks."""
    result, out, _ = small_study
    page = (out / "study.html").read_text()
    ids = set(re.findall(r' id="([^"]*)"', page))
    assert {cell.id for cell in result.cells} <= ids
    assert {unquote(link) for link in re.findall(r'href="#([^"]*)"', page)} <= ids
    assert not any(" " in name for name in ids)


def test_the_same_study_again_gives_the_same_numbers(small_study: tuple[StudyResult, Path, Path]) -> None:
    result, out, file = small_study
    again = study(file, out=out)
    assert again.cells == result.cells and again.parts == result.parts and again.answers == result.answers


def test_what_an_earlier_command_found_stays_until_it_is_found_again(
    small_study: tuple[StudyResult, Path, Path], tmp_path: Path
) -> None:
    result, found, file = small_study
    out = Path(shutil.copytree(found, tmp_path / "out"))

    class Stopped(Silent):
        def start(self, stage: str, total: int | None) -> None:
            if stage.endswith("schemes eight"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(file, out=out, options=RunOptions(progress=Stopped()))
    kept = msgspec.json.decode((out / "study.json").read_bytes(), type=StudyResult)
    assert (kept.cells, kept.parts, kept.answers) == (result.cells, result.parts, result.answers)
    with pytest.raises(KeyboardInterrupt):
        study(read_study(file, limit=7), out=out, options=RunOptions(progress=Stopped()))
    other = msgspec.json.decode((out / "study.json").read_bytes(), type=StudyResult)
    assert {cell.schemes for cell in other.cells} == {"usual"}, "of another study nothing is taken over"


def test_a_budget_that_a_model_cannot_have_costs_no_other_cell(inputs: Any, tmp_path: Path) -> None:
    text = f"""
        targets = ["ort-cpu"]
        [budget.wrong]
        head-sqnr-db = {{ nowhere = 30.0 }}
        [budget.loose]
        min-sqnr-db = 1.0
        [[model]]
        model = "{inputs.classifier}"
        data = "{inputs.images}"
        """
    wrong, loose = study(write(tmp_path / "study.toml", text), out=tmp_path / "out").cells
    assert "nowhere" in wrong.failed and not loose.failed and loose.variants


def test_sets_of_schemes_are_told_apart() -> None:
    """The part that is worst with one set is not with the other, and no row of one stands for the other."""
    known = Estimate(value=3.0, low=1.0, high=5.0)
    parts, contrasts = [], []
    for schemes, sqnr in (("usual", (20.0, 23.0)), ("four", (23.5, 20.5))):
        ids = [f"vlm/ort-cpu/{schemes}/side/{name}" for name in ("tower", "head")]
        for row, part, db in zip(ids, ("tower", "head"), sqnr, strict=True):
            common: dict[str, Any] = {
                "model": "vlm",
                "family": "mobilevlm",
                "target": "ort-cpu",
                "schemes": schemes,
                "part": part,
            }
            damage = Estimate(value=db, low=db - 1, high=db + 1)
            parts += [
                PartDamage(id=f"{row}{scope}", scope=scope, scheme="int8", head="", units=1, sqnr_db=damage, **common)
                for scope in ("", "operator", "region")
            ]
        value = known if schemes == "usual" else known.negated
        contrasts.append(
            PartContrast(
                question=MOST_SENSITIVE,
                first=ids[0],
                second=ids[1],
                value=value,
                **{k: common[k] for k in ("model", "target", "schemes")},
            )
        )
    told = [a.told for a in answer_all((), parts, contrasts) if a.question == MOST_SENSITIVE]
    assert len(told) == 2
    assert told[0].startswith("vlm on ort-cpu, each") and "The tower does" in told[0]
    assert told[1].startswith("vlm on ort-cpu with four, each") and "The head does" in told[1]
    found = heat_map(parts, "operator")
    assert found.columns == ("vlm on ort-cpu", "vlm on ort-cpu with four")
    assert {name: [one.sqnr_db.value for one in line if one] for name, line in found.lines} == {
        "tower": [20.0, 23.5],
        "head": [23.0, 20.5],
    }


def test_tables_hold_what_the_result_says(small_study: tuple[StudyResult, Path, Path]) -> None:
    result, out, _ = small_study
    lines = list(csv.DictReader(io.StringIO((out / "parts.csv").read_text())))
    assert {line["id"] for line in lines} == {part.id for part in result.parts}
    versions = list(csv.DictReader(io.StringIO((out / "study.csv").read_text())))
    assert {line["version"] for line in versions} >= {"float", "all lowest", "mixed"}


def test_shares_of_parts_add_up(small_study: tuple[StudyResult, Path, Path]) -> None:
    """Regions, kinds of operators, and weights with activations each divide all roundings among them."""
    result, _, _ = small_study
    for scope in ("region", "operator", "kind"):
        rows = [p for p in result.parts if p.scope == scope and p.head and p.id.startswith("classifier/ort-cpu/eight/")]
        assert rows
        for head in {p.head for p in rows}:
            shares = [p.share.value for p in rows if p.head == head and p.share is not None]
            assert sum(shares) == pytest.approx(1.0, abs=0.02)


def test_damage_of_a_part_is_that_of_the_probe_matrix(small_study: tuple[StudyResult, Path, Path]) -> None:
    """Summed site by site, without the function under test and without interactions of different sites."""
    result, out, _ = small_study
    cell = next(c for c in result.cells if c.schemes == "eight" and not c.failed)
    tables = read_tables(out / cell.folder)
    for region, members in top_regions(tables.units).items():
        plan = bitalloy.Plan({u.id: u.choices[0] for u in members if u.choices})
        row = next((p for p in result.parts if p.id == f"classifier/ort-cpu/eight/region/{region}"), None)
        if row is None:
            assert not plan.listed
            continue
        chosen = [tables.matrix.sites.index(s) for s in rounded(tables.units, plan) if s in tables.matrix.sites]
        energy = [
            float((own[..., chosen].sum(axis=-1)).mean() / tables.matrix.energy[:, h].mean())
            for h, own in enumerate(tables.matrix.own)
            if tables.matrix.plain[h]
        ]
        assert row.sqnr_db.value == pytest.approx(-10 * np.log10(np.mean(energy)), abs=3.0)
        assert row.sqnr_db.low <= row.sqnr_db.value <= row.sqnr_db.high


def test_kinds_of_operators(small_study: tuple[StudyResult, Path, Path]) -> None:
    _, out, _ = small_study
    tables = read_tables(next((out / "cells").rglob("summary.json")).parent)
    found = {operator_kind(u, tables.facts.operators, frozenset()) for u in tables.units.units}
    assert "convolution" in found and "depthwise convolution" not in found
    conv = next(u for u in tables.units.units if u.kind == "Conv")
    assert operator_kind(conv, tables.facts.operators, frozenset(conv.core)) == "depthwise convolution"


def test_a_part_of_nothing_has_no_damage(small_study: tuple[StudyResult, Path, Path]) -> None:
    _, out, _ = small_study
    tables = read_tables(next((out / "cells").rglob("summary.json")).parent)
    effects = Effects(tables.matrix, tables.units, 0)
    assert effects.of_units([]) is None
    assert effects.of_units(tables.units.units, heads=["no such head"]) is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("targets = [", "cannot be read as TOML"),
        ("", "`model`"),
        ("[[model]]\nmodle = 'x'", "modle"),
        ("[[model]]\nmodel = 'yolo11n-shapes'\n[[model]]\nmodel = 'yolo11n-shapes'", "are named"),
        ("targets = ['ort-gpu']\n[[model]]\nmodel = 'yolo11n-shapes'", "ort-gpu"),
        ("[schemes]\nlow = ['int3']\n[[model]]\nmodel = 'yolo11n-shapes'", "int3"),
        ("schemes = {}\n[[model]]\nmodel = 'yolo11n-shapes'", "no set of schemes"),
        ("budget = {}\n[[model]]\nmodel = 'yolo11n-shapes'", "no budget"),
        ("seed = -1\n[[model]]\nmodel = 'yolo11n-shapes'", "seed"),
        ("limit = 0\n[[model]]\nmodel = 'yolo11n-shapes'", "limit"),
        ("[[model]]\nmodel = 'yolo11n-shapes'\nshape = {images = [1, 0]}", "shape"),
        (
            "targets = ['ort-cpu', 'tensorrt']\n[schemes]\nboth = ['int8-dynamic', 'fp16']\n[[model]]\nmodel = 'x'",
            "no target of ort-cpu, tensorrt has all",
        ),
        ("effort = 'huge'\n[[model]]\nmodel = 'yolo11n-shapes'", "huge"),
        ("[budget.a]\nlatenzy = '0.7x'\n[[model]]\nmodel = 'yolo11n-shapes'", "latenzy"),
        ("[budget.a]\nlatency = 'soon'\n[[model]]\nmodel = 'yolo11n-shapes'", "soon"),
        ("[[model]]\nmodel = 'yolo11n-shapes'\nname = '../evil'", "evil"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(BitalloyError, match=told):
        read_study(write(tmp_path / "study.toml", text))
    assert [path.name for path in tmp_path.iterdir()] == ["study.toml"]


def test_a_study_of_nothing_that_is_here_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "study.toml", "[[model]]\nmodel = 'nowhere.onnx'")
    with pytest.raises(BitalloyError, match="nowhere"):
        study(file, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_shipped_list_has_all_variants() -> None:
    planned = read_study(SHIPPED)
    names = [model.model for model in planned.asked.models]
    assert names == [name for family in zoo.families() for name in family.variants]
    missing = {lack.model for lack in lacks_of(planned) if "Not there" in lack.what}
    assert missing == set(names) or (SHIPPED.parent / "checkpoints").is_dir()


def test_without_a_file_the_embedded_models_are_studied() -> None:
    planned = read_study()
    assert [model.model for model in planned.asked.models] == [*zoo.NAMES, *zoo.PROGRAMS]
    assert "ort-cpu" in planned.targets and "tensorrt" not in planned.targets


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.1, 2.0, "yes"), (-2.0, -0.1, "no"), (-1.0, 1.0, "undecided"), (0.0, 1.0, "undecided")],
)
def test_verdicts_follow_from_intervals(low: float, high: float, verdict: str) -> None:
    assert answer_verdict(Estimate(value=(low + high) / 2, low=low, high=high)) == verdict


def test_a_dry_run_says_what_is_missing(inside: Any) -> None:
    found = inside("study", SHIPPED, "--dry-run")
    assert found.code == 0
    assert "20 models" in found.out and "yolo11x-seg" in found.out and "POPE" in found.out
    assert not (inside.folder / "runs" / "study").exists()
