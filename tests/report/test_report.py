"""The report: complete, deterministic, safe against hostile names, and alive in a real browser."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image

from bitalloy.core.checked import MovedUnit, RunDifference
from bitalloy.core.examples import ClassPrecision, Example, Examples, ExampleText
from bitalloy.core.outcome import Comparison, Correction, HeadComparison, Remeasured, Repair
from bitalloy.core.plans import Budget
from bitalloy.core.records import Calibration, Estimate, Histogram, SensitivityTable, TensorRange
from bitalloy.core.studies import Answer, Lack, MeasuredVariant, PartContrast, PartDamage, StudyCell, StudyResult
from bitalloy.report import charts, figures, formats
from bitalloy.report.breakdown import ReportTables, region_tree
from bitalloy.report.compare import ComparedRun, render_comparison
from bitalloy.report.plots import plots_of
from bitalloy.report.ranges import SHOWN_RANGES, worst_ranges
from bitalloy.report.render import LIBRARIES, SCRIPTS, Extras, embedded_json
from bitalloy.report.study import render_study
from bitalloy.report.tables import sensitivity_csv, sensitivity_json
from bitalloy.report.targets import compare_targets
from bitalloy.report.text import readable
from bitalloy.verify.compare import compare_numbers

AXE = "4.14.1"
EVIL = "</script><img src=x onerror=alert(1)>\"'&<!--<script>\u2028"
Make = Callable[..., Any]


class Page(HTMLParser):
    """Elements and attributes of a page, as a browser's tokenizer would split it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[-1] += data

    def payload(self) -> Any:
        return json.loads(self.scripts[0])


class TestPage:
    def test_is_one_file_without_any_reference_outside(self, make_run: Make) -> None:
        page = Page(make_run().render())
        for tag, attributes in page.tags:
            assert tag not in {"iframe", "object", "embed", "img", "base", "form"}
            for name in ("src", "href", "action", "style", "xlink:href"):
                value = attributes.get(name)
                assert value is None or value.startswith(("#", "data:")), (tag, name, value)
            assert not any(name.startswith("on") for name in attributes)
        text = make_run().render()
        style = text[text.index("<style>") : text.index("</style>")]
        assert "url(" not in style and "@import" not in style

    def test_has_all_sections_in_order(self, make_run: Make) -> None:
        ids = [a["id"] for t, a in Page(make_run().render()).tags if t in {"header", "section"} and "id" in a]
        assert ids == ["result", "figures", "tradeoff", "latency", "graph", "regions", "sensitivity", "method"]

    def test_is_the_same_for_the_same_records(self, make_run: Make) -> None:
        assert make_run().render() == make_run().render()

    def test_does_not_depend_on_the_hash_seed(self) -> None:
        code = (
            "import importlib.util, sys\n"
            "spec = importlib.util.spec_from_file_location('factory', sys.argv[1])\n"
            "factory = importlib.util.module_from_spec(spec)\n"
            "sys.modules['factory'] = factory\n"
            "spec.loader.exec_module(factory)\n"
            "sys.stdout.buffer.write(factory.make_run(blocks=4).render().encode())\n"
        )
        pages = [
            subprocess.run(
                [sys.executable, "-c", code, str(Path(__file__).with_name("conftest.py"))],
                env={**os.environ, "PYTHONHASHSEED": seed},
                capture_output=True,
                check=True,
            ).stdout
            for seed in ("1", "2")
        ]
        assert pages[0] == pages[1]
        assert len(pages[0]) > 10_000

    def test_is_small_for_a_detector_of_usual_size(self, make_run: Make) -> None:
        run = make_run(blocks=60)
        assert len(run.units.units) >= 212
        assert len({r.id for r in run.table.rows if r.scope == "site"}) >= 537
        assert len(run.render().encode()) < 2_500_000

    def test_holds_every_unit_region_and_site(self, make_run: Make) -> None:
        run = make_run()
        scopes = Page(run.render()).payload()["scopes"]
        assert [r["name"] for r in scopes["unit"]] == [u.id for u in run.units.units]
        for scope in ("region", "site"):
            assert {r["name"] for r in scopes[scope]} >= {r.id for r in run.table.rows if r.scope == scope}

    def test_unit_without_int8_shows_why(self, make_run: Make) -> None:
        last = Page(make_run().render()).payload()["scopes"]["unit"][-1]
        assert last["scheme"] == "fp32"
        assert "too much for one scale" in last["reason"]
        assert last["sqnr"] == [None, None]

    def test_divergences_have_a_row_with_prediction_and_measurement(self, make_run: Make) -> None:
        run = make_run()
        assert "Shift of predictions" not in run.render()
        lowest, mixed = Comparison(predicted=0.51234, measured=0.7), Comparison(predicted=0.0009, measured=0.0012)
        page = run.with_summary(kl_nats={"scores": HeadComparison(lowest=lowest, mixed=mixed)}).render()
        assert "Shift of predictions (KL divergence, nats, measured)" in page
        assert all(text in page for text in ("predicted 0.512", "0.0012", "predicted 0.0009"))


class TestForeignNames:
    def test_hostile_names_add_no_element(self, make_run: Make) -> None:
        clean = Page(make_run().render())
        dirty = Page(hostile(make_run).render())
        assert [t for t, _ in dirty.tags] == [t for t, _ in clean.tags]
        assert [set(a) for _, a in dirty.tags] == [set(a) for _, a in clean.tags]

    def test_hostile_names_arrive_unchanged_in_the_data(self, make_run: Make) -> None:
        names = [u["name"] for u in Page(hostile(make_run).render()).payload()["scopes"]["unit"]]
        assert any(n.startswith(EVIL) for n in names)

    def test_json_cannot_end_its_script(self) -> None:
        text = embedded_json([EVIL, "\u2029"])
        assert not set("<>&\u2028\u2029") & set(text)
        assert json.loads(text) == [EVIL, "\u2029"]

    def test_policy_forbids_everything_but_the_page_itself(self, make_run: Make) -> None:
        policy = next(a["content"] for t, a in Page(make_run().render()).tags if "http-equiv" in a)
        assert policy is not None
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy


class TestVerdict:
    def test_good_when_faster_and_within_budget(self, make_run: Make) -> None:
        page = make_run().with_summary(budget=Budget()).render()
        assert '<header id="result" class="good">' in page and "<b>Ship it</b> It is faster, and no metric" in page

    def test_bad_when_not_faster_than_float(self, make_run: Make) -> None:
        run = make_run().with_summary(latency_ratio=1.0, headline="The mixed model is NOT faster than float")
        assert '<header id="result" class="bad">' in run.render()

    @pytest.mark.parametrize(
        "budget",
        [Budget(latency_ratio=0.1), Budget(latency_ms=0.01), Budget(size_bytes=10), Budget(min_sqnr_db=90.0)],
        ids=["ratio", "ms", "size", "sqnr"],
    )
    def test_refuses_when_a_limit_is_missed(self, make_run: Make, budget: Budget) -> None:
        run = make_run().with_summary(budget=budget)
        page = run.render()
        assert '<header id="result" class="bad">' in page and "<b>Do not ship it</b> A limit is missed" in page
        assert [(tone, verdict) for tone, verdict, _ in figures.limits(run.summary.status)] == [("bad", "missed")]

    def test_latency_within_two_percent_counts_as_met_within_tolerance(self, make_run: Make) -> None:
        run = make_run()
        budget = Budget(latency_ratio=run.summary.latency_ratio / 1.015)
        page = run.with_summary(budget=budget).render()
        assert '<li class="good"><b>met within tolerance (5%)</b> latency over float' in page
        assert '<header id="result" class="good">' in page

    def test_a_drop_beyond_noise_without_a_limit_makes_the_page_amber(self, make_run: Make) -> None:
        run = make_run()
        assert '<header id="result" class="good">' in run.render()
        metric = run.summary.metrics["AP50-95"]
        lost = msgspec.structs.replace(metric, drop_mixed=Estimate(value=0.02, low=0.004, high=0.03))
        metrics = {**run.summary.metrics, "AP50-95": lost}
        page = run.with_summary(metrics=metrics).render()
        assert '<header id="result" class="warn">' in page and "AP50-95 drops by 0.0200" in page
        limited = run.with_summary(metrics=metrics, budget=Budget(max_drop={"AP50-95": 0.1})).render()
        assert '<header id="result" class="good">' in limited and "drops by" not in limited

    def test_an_undecided_limit_is_amber_with_its_reason(self, make_run: Make) -> None:
        page = make_run().with_summary(budget=Budget(max_drop={"AP50-95": 0.005})).render()
        assert '<header id="result" class="warn">' in page
        assert '<li class="warn"><b>undecided</b> drop of AP50-95' in page and "probability of 61%" in page
        assert "--eval LABELS --max-drop AP50-95=0.005" in page

    def test_no_limits_are_said(self, make_run: Make) -> None:
        assert "Status: <b>no limits</b>" in make_run().with_summary(budget=Budget()).render()

    def test_wide_gap_between_prediction_and_measurement_is_coloured(self, make_run: Make) -> None:
        run = make_run()
        assert 'class="bad">predicted' not in run.render()
        pair = run.summary.sqnr_db["scores"]
        far = msgspec.structs.replace(pair.mixed, measured=(pair.mixed.predicted or 0) - 3.2)
        wide = run.with_summary(sqnr_db={**run.summary.sqnr_db, "scores": msgspec.structs.replace(pair, mixed=far)})
        assert 'class="bad">predicted' in wide.render()
        assert any("differ by more than 3 dB on scores" in line for line in figures.cautions(wide.summary))

    def test_cautions_name_what_is_unsafe(self, make_run: Make) -> None:
        summary = make_run().with_summary(settled=False, half_margin=0.25).summary
        text = "\n".join(figures.cautions(summary))
        assert "embedded sample" in text
        assert "had not settled after 24 samples" in text
        assert "exceed the FP16 range by a factor of 4" in text


class TestVariants:
    def test_without_metrics(self, make_run: Make) -> None:
        page = make_run(metrics=False).render()
        assert "Task accuracy" not in page
        assert "No task metric" in page

    def test_with_a_metric_without_paired_drop(self, make_run: Make) -> None:
        page = make_run().render()
        assert "Drop of AP50-95" in page
        assert "Drop of AP50<" not in page

    def test_with_one_head(self, make_run: Make) -> None:
        page = make_run(heads=("logits",)).render()
        assert re.search(r"<fieldset hidden>\s*<legend>Head", page)

    def test_with_more_heads_than_colours(self, make_run: Make) -> None:
        heads = tuple(f"out{i}" for i in range(charts.PALETTE + 2))
        assert all(head in make_run(heads=heads, blocks=2).render() for head in heads)

    def test_with_an_empty_front(self, make_run: Make) -> None:
        page = make_run().with_plan(pareto=()).render()
        assert "without a Pareto front" in page
        assert "plans as a table" not in page

    def test_with_a_single_model_without_regions(self, make_run: Make) -> None:
        run = make_run(blocks=2)
        units = tuple(msgspec.structs.replace(u, region="(model)") for u in run.units.units)
        tables = ReportTables(
            run.plan, run.table, msgspec.structs.replace(run.units, units=units), run.cost, ("boxes", "scores")
        )
        assert [line.id for line in region_tree(tables)] == ["(model)"]

    def test_with_no_sensitivity_at_all(self, make_run: Make) -> None:
        run = make_run()
        empty = msgspec.structs.replace(run.table, rows=())
        Page(type(run)(run.summary, run.plan, empty, run.units, run.cost).render()).payload()

    def test_with_corrections(self, make_run: Make) -> None:
        tried = Correction(
            name="bias",
            places=7,
            kept=True,
            reason="mean SQNR of the all-INT8 model +1.20 dB",
            without_db={"boxes": 30.0, "scores": 20.0},
            with_db={"boxes": 31.4, "scores": 21.0},
            fitted_samples=12,
            samples=16,
        )
        untried = Correction(name="smoothing", places=0, kept=False, reason=f"no place {EVIL}")
        run = make_run().with_summary(corrections=(untried, tried))
        page = run.render()
        ids = [a["id"] for t, a in Page(page).tags if t == "section" and "id" in a]
        assert ids.index("corrections") == ids.index("latency") + 1
        _, (other, line) = figures.corrections(run.summary, ("boxes", "scores"))
        assert line[:4] == ("bias", "yes", "7", "16, 12")
        assert line[4:6] == ("30.0 dB → 31.4 dB", "20.0 dB → 21.0 dB")
        assert other[1] == "no" and set(other[3:6]) == {formats.NONE}
        assert EVIL not in page


class TestExamples:
    def test_pictures_lie_in_the_page_with_what_they_show(self, make_run: Make) -> None:
        page = Page(make_run().render(with_examples()))
        pictures = [a for t, a in page.tags if t == "img"]
        assert [a["alt"] for a in pictures] == ["a.png, float model", "a.png, mixed model", "a.png"]
        assert all((a["src"] or "").startswith("data:image/jpeg;base64,") for a in pictures)

    def test_classes_come_with_interval_and_what_noise_is(self, make_run: Make) -> None:
        examples = with_examples().examples
        _, (line,) = figures.classes(examples)
        assert line == ("a.png", "3", "0.5000", "0.1000", "+0.4000 [0.2000, 0.6000]", "beyond noise")
        assert "beyond noise" in make_run().render(with_examples())

    def test_hostile_names_add_no_element(self, make_run: Make) -> None:
        clean, dirty = (Page(make_run().render(with_examples(name))) for name in ("a.png", EVIL))
        assert [t for t, _ in clean.tags] == [t for t, _ in dirty.tags]


class TestRanges:
    def test_worst_tensors_come_first_with_what_is_cut_off(self, make_run: Make) -> None:
        run = make_run()
        tensors = dict.fromkeys(edge.root for edge in run.units.edges)
        ranges = tuple(
            TensorRange(tensor=t, low=-1.0, high=2.0, method="percentile", magnitude=4.0, subnormal=0.0)
            for t in tensors
        )
        calibration = Calibration(
            model_sha256="", data=run.summary.calibration, method="auto", ranges=ranges, half_margin=1.0
        )
        found = worst_ranges(tables_of(run), calibration)
        sqnr = [float(one.sqnr.removesuffix(" dB")) for one in found]
        assert len(found) == SHOWN_RANGES and sqnr == sorted(sqnr)
        sites = [r for r in run.table.rows if r.scope == "site" and r.part == "activations" and "#" not in r.id]
        assert sqnr[0] == round(min(r.sqnr_db.value for r in sites), 1)
        assert {(one.kept, one.seen, one.cut) for one in found} == {("−1.000 to 2.000", "4.000", "50.0 %")}
        assert '<section id="ranges">' in run.render(Extras(calibration=calibration))
        assert '<section id="ranges">' not in run.render()

    def test_a_histogram_shows_what_lies_beyond_the_range(self, make_run: Make) -> None:
        """Bins of width 1 from -3 to 3; the range from -1 to 2 leaves out those at -3, -2 and 2."""
        run = make_run()
        histogram = Histogram(low=-3.0, width=1.0, counts=(1, 0, 5, 70, 20, 4))
        ranges = tuple(
            TensorRange(tensor=t, low=-1.0, high=2.0, method="mse", magnitude=3.0, subnormal=0.0, histogram=histogram)
            for t in dict.fromkeys(edge.root for edge in run.units.edges)
        )
        calibration = Calibration(
            model_sha256="", data=run.summary.calibration, method="auto", ranges=ranges, half_margin=1.0
        )
        one = worst_ranges(tables_of(run), calibration)[0]
        assert one.clipped == "5 %" and one.picture is not None
        drawn = [line.split('"')[1::2] for line in str(one.picture).split("<rect class=")[1:]]
        assert [name for name, *_ in drawn] == ["clipped", "kept", "kept", "kept", "clipped", "end", "end"]
        heights = [float(values[4]) for values in drawn[:5]]
        assert max(heights) == heights[2] == 34.0 and heights == sorted(heights[:3]) + sorted(heights[3:], reverse=True)
        ends = [float(values[1]) for values in drawn[5:]]
        assert ends == pytest.approx([160 * 2 / 6, 160 * 5 / 6], abs=0.06)
        page = run.render(Extras(calibration=calibration))
        assert page.count('<svg class="histogram"') == SHOWN_RANGES and "Values cut off" in page


class TestTargets:
    def test_stand_side_by_side_with_intervals_and_gaps_that_say_so(self, make_run: Make) -> None:
        one = make_run().summary
        other = msgspec.structs.replace(make_run(metrics=False, heads=("boxes",)).summary, target="far", device=EVIL)
        header, lines = compare_targets((one, other))
        found = {name: cells for name, *cells in lines}
        assert header == ("", "ort-cpu", "far")
        assert found["Drop of AP50-95"] == ["+0.0040 [−0.0030, 0.0110]", "unknown"]
        assert found["SQNR scores"][1] == "unknown" and found["SQNR boxes"][0].endswith("]")
        page = make_run().render(Extras(others=(other,)))
        assert '<section id="targets">' in page and EVIL not in page

    def test_one_target_is_not_compared(self, make_run: Make) -> None:
        assert '<section id="targets">' not in make_run().render()


class TestRegionTree:
    def test_parents_come_first_and_hold_their_children(self, make_run: Make) -> None:
        run = make_run()
        lines = region_tree(ReportTables(run.plan, run.table, run.units, run.cost, ("boxes", "scores")))
        assert lines[0].units == len(run.units.units)
        for line in lines[1:]:
            assert line.parent is not None and line.parent < line.index
            assert line.units <= lines[line.parent].units
            assert line.level == lines[line.parent].level + 1

    def test_chains_of_single_regions_are_joined(self, make_run: Make) -> None:
        run = make_run()
        lines = region_tree(ReportTables(run.plan, run.table, run.units, run.cost, ("boxes", "scores")))
        found = {line.id: line for line in lines}
        assert "model.1/m.0/cv1" in found
        assert found["model.1/m.0"].label == "m.0"
        units = tuple(u for u in run.units.units if u.region.startswith("model.1/"))
        only = ReportTables(run.plan, run.table, msgspec.structs.replace(run.units, units=units), run.cost, ("boxes",))
        assert [line.label for line in region_tree(only)][:2] == ["(model)", "model.1/m.0"]


class TestFiles:
    def test_csv_round_trips(self, make_run: Make) -> None:
        table: SensitivityTable = hostile(make_run).table
        lines = list(csv.DictReader(io.StringIO(sensitivity_csv(table), newline="")))
        assert len(lines) == len(table.rows)
        for line, row in zip(lines, table.rows, strict=True):
            names = [name.replace("\u2028", "\\u2028") for name in (row.scope, row.id, row.part, row.head)]
            assert [line["scope"], line["id"], line["part"], line["head"]] == names  # one line each
            assert (float(line["sqnr_db"]), float(line["low_db"]), float(line["high_db"])) == (
                row.sqnr_db.value,
                row.sqnr_db.low,
                row.sqnr_db.high,
            )
            assert line["flagged"] == ("true" if row.flagged else "false")
            assert line["scheme"] == row.scheme

    def test_csv_escapes_line_breaks_and_keeps_quotes(self, make_run: Make) -> None:
        table = make_run(blocks=2, name=lambda s: f'a"b,c\r\nd\re\n{s}').table
        lines = list(csv.DictReader(io.StringIO(sensitivity_csv(table), newline="")))
        assert [line["id"] for line in lines] == [
            row.id.replace("\r", "\\r").replace("\n", "\\n") for row in table.rows
        ]

    def test_json_round_trips(self, make_run: Make) -> None:
        table = make_run().table
        text = sensitivity_json(table)
        assert text.startswith("{\n")
        assert msgspec.json.decode(text, type=SensitivityTable) == table


class TestLines:
    def test_a_table_of_several_schemes_has_a_line_for_each(self, make_run: Make) -> None:
        table = make_run(blocks=2).table
        rows = tuple(r for r in table.rows if (r.scope, r.part) == ("unit", "all"))
        columns, lines = readable(msgspec.structs.replace(table, rows=rows))
        assert all(len(line) == len(columns) for line in lines) and not any("INT8" in line for line in lines)
        half = tuple(msgspec.structs.replace(r, scheme="fp16") for r in rows)
        columns, both = readable(msgspec.structs.replace(table, rows=(*rows, *half)))
        assert all(len(line) == len(columns) for line in both)
        for name in ("INT8", "FP16"):
            assert [(*line[:2], *line[3:]) for line in both if line[2] == name] == lines


class TestCharts:
    def test_every_plan_of_the_front_has_its_command(self, make_run: Make) -> None:
        run = make_run()
        view = plots_of(run.summary, tables_of(run)).views[0]
        points = [p for p in view.points if p.plan]
        assert len(points) == len(run.plan.pareto)
        for point in points:
            asked = float(point.command.removeprefix("bitalloy plan . --latency ").removesuffix("x"))
            assert point.x <= asked < point.x + 0.002
            assert point.command in "".join(p.command for p in points)

    def test_metrics_with_paired_drops_have_a_view(self, make_run: Make) -> None:
        run = make_run().with_summary(budget=Budget(max_drop={"AP50-95": 0.01}))
        *heads, metric = plots_of(run.summary, tables_of(run)).views
        assert [v.name for v in heads] == ["boxes", "scores"] and metric.name == "AP50-95"
        assert [(p.shape, p.y, p.low, p.high) for p in metric.points] == [
            ("mixed", 0.004, -0.003, 0.011),
            ("lowest", 0.041, 0.022, 0.06),
        ]
        assert metric.limit == 0.01

    def test_checks_hold_what_was_predicted_and_measured(self, make_run: Make) -> None:
        run = make_run()
        predicted = tuple(pair.mixed.predicted for pair in run.summary.sqnr_db.values())
        one = msgspec.structs.replace(
            run.summary.rounds[0],
            predicted_db=predicted,
            repair=Repair(
                gap_db={}, left_db={}, remeasured=(Remeasured(units=("/model.1/Add",), change_db={"boxes": 2.0}),)
            ),
        )
        run = run.with_summary(rounds=(one,))
        checks = plots_of(run.summary, tables_of(run)).checks
        assert [(p.x, p.y) for p in checks if p.shape == "mixed"] == list(zip(predicted, one.sqnr_db, strict=True))
        (unit,) = (p for p in checks if p.shape == "dot")
        row = next(r for r in run.table.rows if (r.id, r.head, r.part) == ("/model.1/Add", "boxes", "all"))
        assert (unit.x, unit.y) == (row.sqnr_db.value, row.sqnr_db.value - 2.0)

    def test_formats_mark_zero_error(self) -> None:
        assert formats.decibel_text(160.0) == "no error"
        assert formats.decibel_text(-3.25) == "−3.2 dB"


def with_examples(name: str = "a.png") -> Extras:
    """Two images with pictures, and one with answers; and a class that is lost."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 24), (200, 30, 90)).save(buffer, "JPEG")
    jpeg = buffer.getvalue()
    text = ExampleText(asked=f"what is {name}?", reference=name, mixed="")
    worst = (
        Example(name=name, agreement=0.25, reference=jpeg, mixed=jpeg),
        Example(name=name, agreement=0.5, reference=jpeg, mixed=b"", texts=(text,)),
    )
    lost = ClassPrecision(name=name, labels=3, reference=0.5, mixed=0.1, drop=Estimate(value=0.4, low=0.2, high=0.6))
    shown = Examples(task="detection", measure="overlap", samples=9, same=7, worst=worst, classes=(lost,))
    return Extras(examples=shown)


def tables_of(run: Any) -> ReportTables:
    return ReportTables(run.plan, run.table, run.units, run.cost, figures.heads_of(run.plan, run.summary))


def hostile(make_run: Make) -> Any:
    """A run in which every foreign string tries to break out."""
    run = make_run(heads=(EVIL + "boxes", EVIL + "scores"), name=lambda s: EVIL + s)
    units = tuple(
        msgspec.structs.replace(u, region=EVIL.replace("/", "") + u.region, kind=EVIL, reason=EVIL)
        for u in run.units.units
    )
    summary = run.summary
    metrics = {EVIL + k: v for k, v in summary.metrics.items()}
    data = msgspec.structs.replace(summary.analysis, name=EVIL, preprocessing=EVIL)
    changed = run.with_summary(
        headline=EVIL, model=EVIL, device=EVIL, target=EVIL, notes=(EVIL,), metrics=metrics, calibration=data,
        versions={**summary.versions, EVIL: EVIL}, seconds={EVIL: 1.0},
    )  # fmt: skip
    return type(run)(changed.summary, run.plan, run.table, msgspec.structs.replace(run.units, units=units), run.cost)


# --- in a real browser -----------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1366,768",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium with its console and network logs."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs chromium and chromedriver on the PATH")
    webdriver = pytest.importorskip("selenium.webdriver")
    service = pytest.importorskip("selenium.webdriver.chrome.service")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=service.Service(executable_path=DRIVER))
    driver.set_script_timeout(30)
    driver.get("about:blank")
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The code of axe-core, which finds barriers, from the npm registry."""
    npm, folder = shutil.which("npm"), tmp_path_factory.mktemp("axe")
    if npm is None:
        pytest.skip("needs npm")
    command = [npm, "pack", f"axe-core@{AXE}", "--silent", "--fetch-retries=0", "--fetch-timeout=20000"]
    if subprocess.run(command, cwd=folder, capture_output=True, timeout=60, check=False).returncode:
        pytest.skip("the npm registry is out of reach")
    with tarfile.open(folder / f"axe-core-{AXE}.tgz") as package:
        file = package.extractfile("package/axe.min.js")
        assert file is not None
        return file.read().decode()


@pytest.fixture
def visit(browser: Any, tmp_path: Path) -> Callable[..., Any]:
    """Open the report of a run from a file and return the browser."""

    def opened(run: Any, extras: Extras | None = None) -> Any:
        path = tmp_path / "report.html"
        path.write_text(run.render(extras), encoding="utf-8")
        for log in ("browser", "performance"):
            browser.get_log(log)
        browser.get(path.as_uri())
        return browser

    return opened


def column(browser: Any, number: int) -> list[str]:
    """Texts of one column of the sensitivity table."""
    script = "return [...document.querySelectorAll('#table tbody tr')].map(r => r.cells[arguments[0]].textContent)"
    return [str(text) for text in browser.execute_script(script, number)]


def leading_number(text: str) -> float:
    """The SQNR at the start of a cell such as `30.1[29.0, 31.2]`; the worst possible place for cells without one."""
    match = re.match(r"[−0-9.]+", text)
    return float(match.group().replace("−", "-")) if match else float("inf")


def click(browser: Any, selector: str) -> None:
    """Click as a user does: at the element's place, which must not be covered."""
    element = browser.find_element("css selector", selector)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    element.click()


def wait_for(browser: Any, selector: str) -> None:
    """Wait until an element is there, a few seconds at most."""
    from selenium.webdriver.support.wait import WebDriverWait

    WebDriverWait(browser, 10).until(lambda page: page.find_elements("css selector", selector))


def barriers(page: Any, axe: str, width: int, *, drawn: str = "main") -> tuple[list[str], bool]:
    """What axe finds on a page with everything open, and whether nothing of it lies beside the window."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        wait_for(page, drawn)
        overflow = page.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
        page.execute_script(axe)
        script = (
            "axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa']}).then((found) =>"
            " arguments[0](found.violations.map((v) => v.id + ': ' + v.nodes[0].html.slice(0, 200))));"
        )
        return page.execute_async_script(script), overflow <= 0
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def small_study() -> StudyResult:
    """Two models on one target, one of which gave no result, with parts from hardly to much damaged."""
    known = Estimate(value=0.71, low=0.69, high=0.74)
    parts = tuple(
        PartDamage(
            id=f"{scope} {part}",
            model="detector",
            family="yolo11",
            target="ort-cpu",
            scope=scope,
            part=part,
            scheme="int8",
            head="",
            sqnr_db=Estimate(value=db, low=db - 2, high=db + 2),
            share=Estimate(value=share, low=share / 2, high=1.0),
            units=7,
            latency_ratio=0.6,
        )
        for scope in ("region", "operator", "kind")
        for part, db, share in (("first", 12.0, 0.6), ("second", 35.0, 0.3), ("third", 70.0, 0.1))
    )
    variants = (
        MeasuredVariant(name="published", published={"AP50-95": 0.39}),
        MeasuredVariant(name="float", latency_ratio=None, size_bytes=10**7),
        MeasuredVariant(
            name="mixed", latency_ratio=known, size_bytes=10**6, sqnr_db={"boxes": 31.0}, drops={"AP50-95": known}
        ),
    )
    cell = StudyCell(
        model="detector", family="yolo11", target="ort-cpu", schemes="usual", budget="default", folder="cells/detector",
        status="met", variants=variants,
    )  # fmt: skip
    answers = tuple(
        Answer(question=f"Is the first part worse ({verdict})?", verdict=verdict, told="By 23 dB.", value=known,
               rows=(parts[0].id, cell.id))
        for verdict in ("yes", "no", "undecided", "not studied")
    )  # fmt: skip
    contrast = PartContrast(
        question="Is the first part worse (yes)?", model="detector", target="ort-cpu", first=parts[0].id,
        second=parts[1].id, value=known,
    )  # fmt: skip
    return StudyResult(
        cells=(cell, msgspec.structs.replace(cell, model="other", failed="Its file is damaged.", variants=())),
        parts=parts,
        contrasts=(contrast,),
        answers=answers,
        lacks=(Lack(model="third", what="Not there: the checkpoint."),),
        seconds=12.0,
        seed=0,
        versions={"onnx": "1.18.0"},
    )


class TestBrowser:
    def test_console_is_quiet_and_nothing_is_requested(self, make_run: Make, visit: Callable[..., Any]) -> None:
        page = visit(make_run())
        assert page.get_log("browser") == []
        events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        own = [s for s in sent if not s["documentURL"].startswith("chrome://")]  # the browser's own start page
        assert [s["request"]["url"] for s in own if not s["request"]["url"].startswith("data:")] == [page.current_url]

    @pytest.mark.parametrize(
        ("width", "tone", "budget"),
        [
            (390, "good", Budget()),
            (900, "warn", Budget(max_drop={"AP50-95": 0.005})),
            (1400, "bad", Budget(latency_ratio=0.1)),
        ],
        ids=["phone", "tablet", "desktop"],
    )
    def test_has_no_barrier_for_people_who_need_aids(
        self, make_run: Make, visit: Callable[..., Any], axe: str, width: int, tone: str, budget: Budget
    ) -> None:
        page = visit(make_run().with_summary(budget=budget), extras=with_examples())
        assert page.find_elements("css selector", f"#result.{tone}")
        assert barriers(page, axe, width, drawn="#graph-frame svg") == ([], True)

    @pytest.mark.parametrize("width", [390, 1400])
    def test_pages_of_several_runs_have_no_barrier(
        self, make_run: Make, browser: Any, axe: str, tmp_path: Path, width: int
    ) -> None:
        first, second = make_run().summary, make_run(seed=1).summary
        difference = RunDifference(
            first="runs/a",
            second="runs/b",
            same_model=True,
            same_target=False,
            numbers=compare_numbers(first, second),
            units=(MovedUnit(unit="model.0", first="int8", second="fp32"),),
            versions={"onnx": ("1.18.0", "")},
            data={},
        )
        runs = [
            ComparedRun("runs/a", "a/report.html", first, None),
            ComparedRun("runs/b", "", second, difference),
        ]
        for text in (render_comparison(runs), render_study(small_study())):
            path = tmp_path / "page.html"
            path.write_text(text, encoding="utf-8")
            browser.get(path.as_uri())
            assert barriers(browser, axe, width) == ([], True)

    def test_key_figures_start_with_the_mixed_model_on_a_phone(self, make_run: Make, visit: Callable[..., Any]) -> None:
        page = visit(make_run())
        metrics = {"width": 390, "height": 900, "deviceScaleFactor": 1, "mobile": True}
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        try:
            script = (
                "return [...document.querySelectorAll('.figures tbody tr:not(.group)')].map((row) => [...row.cells]"
                ".slice(1).sort((a, b) => a.getBoundingClientRect().top - b.getBoundingClientRect().top)[0]"
                ".dataset.label)"
            )
            first = page.execute_script(script)
        finally:
            page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        assert len(first) > 5 and set(first) == {"mixed"}

    def test_charts_can_be_read_on_a_phone(self, make_run: Make, visit: Callable[..., Any]) -> None:
        page = visit(make_run())
        page.set_window_size(500, 900)  # the narrowest that the browser allows
        try:
            heights = page.execute_script(
                "return [...document.querySelectorAll('.chart svg text')].map(t => t.getBoundingClientRect().height)"
            )
            overflow = page.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
        finally:
            page.set_window_size(1366, 768)
        assert min(heights) > 9
        assert overflow <= 0

    def test_starts_with_the_most_sensitive_unit(self, make_run: Make, visit: Callable[..., Any]) -> None:
        run = make_run()
        page = visit(run)
        rows = [r for r in run.table.rows if r.scope == "unit" and r.part == "all" and r.head == "boxes"]
        assert column(page, 0)[0] == min(rows, key=lambda r: r.sqnr_db.value).id
        assert len(column(page, 0)) == len(run.units.units)

    def test_click_on_a_header_sorts_and_a_second_one_reverses(self, make_run: Make, visit: Callable[..., Any]) -> None:
        run = make_run()
        page = visit(run)
        times = sorted(round(c.us["fp32"], 3) for c in run.cost.units)
        shown = [f"{t:.0f}" if t >= 100 else f"{t:.1f}" for t in times]
        header = page.find_element("css selector", 'th[data-key="time-0"]')
        click(page, 'th[data-key="time-0"] button')
        assert [float(t) for t in column(page, 7)] == sorted(float(t) for t in shown)
        assert header.get_attribute("aria-sort") == "ascending"
        click(page, 'th[data-key="time-0"] button')
        assert [float(t) for t in column(page, 7)] == sorted((float(t) for t in shown), reverse=True)
        assert header.get_attribute("aria-sort") == "descending"
        assert len(page.find_elements("css selector", "#table th[aria-sort]")) == 1

    def test_rows_without_a_number_stay_last(self, make_run: Make, visit: Callable[..., Any]) -> None:
        run = make_run()
        page = visit(run)
        for _ in range(2):
            assert column(page, 0)[-1] == run.units.units[-1].id
            click(page, 'th[data-key="sqnr"] button')

    def test_headers_work_from_the_keyboard(self, make_run: Make, visit: Callable[..., Any]) -> None:
        page = visit(make_run())
        page.find_element("css selector", 'th[data-key="name"] button').send_keys("\ue007")
        names = column(page, 0)
        assert names.index("/model.2/Add") < names.index("/model.3/Add")
        assert page.find_element("css selector", 'th[data-key="name"]').get_attribute("aria-sort") == "ascending"

    def test_filter_keeps_the_rows_with_all_words(self, make_run: Make, visit: Callable[..., Any]) -> None:
        page = visit(make_run())
        page.find_element("id", "filter").send_keys("MODEL.3 silu")
        assert set(column(page, 0)) == {"/model.3/cv1/act/Mul", "/model.3/cv2/act/Mul"}
        assert set(column(page, 1)) == {"SiLU"}
        assert page.find_element("id", "count").text.startswith(f"{len(column(page, 0))} of ")

    def test_scope_and_head_switch(self, make_run: Make, visit: Callable[..., Any]) -> None:
        run = make_run()
        page = visit(run)
        before = column(page, 4)
        click(page, 'input[name="head"][value="1"] + span')
        assert column(page, 4) != before
        assert [leading_number(t) for t in column(page, 4)] == sorted(leading_number(t) for t in column(page, 4))
        click(page, 'input[name="scope"][value="site"] + span')
        assert len(column(page, 0)) == len({r.id for r in run.table.rows if r.scope == "site"})

    def test_region_opens_step_by_step(self, make_run: Make, visit: Callable[..., Any]) -> None:
        page = visit(make_run())

        def shown() -> list[str]:
            rows = page.find_elements("css selector", "#tree tbody tr")
            return [r.find_element("css selector", "th").get_attribute("title") for r in rows if r.is_displayed()]

        assert "model.1" in shown() and "model.1/m.0" not in shown()
        click(page, '#tree th[title="model.1"] button')
        assert "model.1/m.0" in shown() and "model.1/m.0/cv1" not in shown()
        click(page, '#tree th[title="model.1/m.0"] button')
        assert "model.1/m.0/cv1" in shown()
        click(page, '#tree th[title="model.1"] button')
        assert not any(region.startswith("model.1/") for region in shown())
        click(page, "#expand")
        assert len(shown()) == len(page.find_elements("css selector", "#tree tbody tr"))

    def test_region_lists_its_units(self, make_run: Make, visit: Callable[..., Any]) -> None:
        run = make_run(blocks=12)
        page = visit(run)
        click(page, 'button[data-region="model.1"]')
        assert sorted(column(page, 0)) == sorted(u.id for u in run.units.units if f"{u.region}/".startswith("model.1/"))
        click(page, "#region-filter")
        assert len(column(page, 0)) == len(run.units.units)

    def test_hundreds_of_rows_sort_at_once(self, make_run: Make, visit: Callable[..., Any]) -> None:
        page = visit(make_run(blocks=60))
        click(page, 'input[name="scope"][value="site"] + span')
        assert len(column(page, 0)) >= 537
        script = (
            "const start = performance.now();"
            "document.querySelector('th[data-key=name] button').click();"
            "document.body.getBoundingClientRect();"
            "return performance.now() - start;"
        )
        assert min(page.execute_script(script) for _ in range(3)) < 500

    def test_hostile_names_are_shown_and_do_not_run(self, make_run: Make, visit: Callable[..., Any]) -> None:
        page = visit(hostile(make_run))
        page.execute_script("document.querySelectorAll('.toggle, .link').forEach(e => e.click())")
        for scope in ("region", "site", "unit"):
            click(page, f'input[name="scope"][value="{scope}"] + span')
        click(page, "#region-filter")
        assert page.get_log("browser") == []
        assert page.find_elements("css selector", "img") == []
        assert len(page.find_elements("css selector", "script")) == 2 + len(LIBRARIES) + len(SCRIPTS)
        assert column(page, 0)[0].startswith(EVIL)

    def test_a_point_of_the_front_tells_its_plan_to_the_keyboard(
        self, make_run: Make, visit: Callable[..., Any]
    ) -> None:
        run = make_run()
        page = visit(run)
        point = page.find_element("css selector", '#front-chart [role="button"]')
        page.execute_script("arguments[0].focus({focusVisible: true})", point)
        assert "of float's latency" in page.find_element("id", "tip").text
        point.send_keys("\ue007")
        assert "bitalloy plan . --latency" in page.find_element("id", "plan-card").text

    def test_the_front_is_drawn_by_one_head_or_metric(self, make_run: Make, visit: Callable[..., Any]) -> None:
        run = make_run()
        page = visit(run)
        points = "#front-chart [data-tip]"
        assert len(page.find_elements("css selector", points)) == len(run.plan.pareto) + 4
        click(page, 'input[name="view"][value="2"] + span')
        tips = [e.get_attribute("data-tip") for e in page.find_elements("css selector", points)]
        assert len(tips) == 2 and all(tip.startswith("drop of AP50-95: ") for tip in tips)

    def test_graph_opens_closed_regions_down_to_units(self, make_run: Make, visit: Callable[..., Any]) -> None:
        page = visit(make_run(blocks=40))
        click(page, "#graph-details summary")
        wait_for(page, "#graph-frame svg")
        assert len(page.find_elements("css selector", ".graph .node")) == 40
        click(page, '.graph [aria-label$="open region model.1"]')
        page.switch_to.active_element.send_keys("\ue007")  # the focus stays: Enter closes it again
        assert len(page.find_elements("css selector", ".graph .node")) == 40
        page.switch_to.active_element.send_keys("\ue007")
        assert page.find_elements("css selector", '.graph [aria-label="▾ model.1, close region"]')

    def test_graph_shows_a_unit_and_goes_to_its_row(self, make_run: Make, visit: Callable[..., Any]) -> None:
        run = make_run(blocks=40)
        page = visit(run)
        click(page, "#graph-details summary")
        wait_for(page, "#graph-frame svg")
        page.find_element("id", "graph-search").send_keys("model.4/m.0 cv2 SiLU\n")
        card = page.find_element("id", "graph-card").text
        cost = next(c for c in run.cost.units if c.unit == "/model.4/m.0/cv2/act/Mul")
        assert cost.unit in card and f"{cost.us['fp32']:.1f} µs"[:3] in card
        assert next(c.reason for c in run.plan.choices if c.unit == cost.unit) in card
        click(page, "#graph-card button")
        assert column(page, 0) == [cost.unit]

    def test_graph_marks_every_border_of_the_plan(self, make_run: Make, visit: Callable[..., Any]) -> None:
        run = make_run(blocks=4)
        page = visit(run)
        click(page, "#graph-details summary")
        wait_for(page, "#graph-frame svg")
        click(page, "#graph-open")
        scheme = run.plan.chosen.scheme_of
        pairs = {(e.producer, e.consumer) for e in run.units.edges if e.producer and e.consumer}
        borders = sum(scheme(a) != scheme(b) for a, b in pairs)
        assert 0 < borders < len(pairs)
        assert len(page.find_elements("css selector", ".graph .edge")) == len(pairs)
        assert len(page.find_elements("css selector", ".graph .edge.border")) == borders

    def test_graph_of_a_thousand_units_without_regions_starts_with_few_boxes(
        self, make_run: Make, visit: Callable[..., Any]
    ) -> None:
        run = make_run(blocks=8)
        units = tuple(msgspec.structs.replace(u, region="(model)") for u in run.units.units)
        many = tuple(msgspec.structs.replace(u, id=f"{u.id}_{i}") for i in range(25) for u in units)
        graph = msgspec.structs.replace(run.units, units=many, edges=())
        page = visit(type(run)(run.summary, run.plan, run.table, graph, run.cost))
        click(page, "#graph-details summary")
        wait_for(page, "#graph-frame svg")
        assert len(page.find_elements("css selector", ".graph .node")) == 40
        click(page, '.graph [aria-label$="open region units 26 to 50"]')
        assert len(page.find_elements("css selector", ".graph .unit")) == 25

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_text_stands_out_from_its_ground(
        self, make_run: Make, visit: Callable[..., Any], browser: Any, scheme: str
    ) -> None:
        feature = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": feature})
        page = visit(make_run())
        script = (
            "const style = getComputedStyle(document.documentElement);"
            "return [...arguments].map(name => style.getPropertyValue(name).trim());"
        )
        *inks, ground = page.execute_script(script, "--text", "--muted", "--bad", "--accent", "--panel")
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        assert all(contrast(ink, ground) >= 4.5 for ink in inks)

    def test_no_horizontal_overflow_on_a_laptop(self, make_run: Make, visit: Callable[..., Any]) -> None:
        page = visit(make_run())
        assert page.execute_script("return document.documentElement.scrollWidth - window.innerWidth") <= 0


def contrast(first: str, second: str) -> float:
    """WCAG contrast ratio of two `#rrggbb` colours."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)
