"""A checked run for continuous integration: JUnit XML, a page in Markdown, and annotations of GitHub."""

from __future__ import annotations

from collections.abc import Iterator
from xml.etree import ElementTree

from bitalloy.core.checked import CHANGE_VERDICTS, CheckedRun
from bitalloy.core.plain import markdown_cell, one_line
from bitalloy.core.status import Verdict
from bitalloy.report.text import difference_text, limit_text, verdict_text

MARKS = {Verdict.MISSED: "❌", Verdict.UNDECIDED: "❔"}


def junit_xml(checked: CheckedRun) -> bytes:
    """Write a test suite with a test for each limit and each number against the baseline.

    What is missed is a failure; what is undecided is one too, unless the run passed all the same: then it is skipped.
    """
    suite = ElementTree.Element("testsuite", name="bitalloy check")
    counts = {"failure": 0, "skipped": 0}
    tests = list(_lines(checked))
    for name, verdict, told in ((one_line(name), verdict, one_line(told)) for name, verdict, told, _ in tests):
        case = ElementTree.SubElement(suite, "testcase", classname=f"bitalloy.{one_line(checked.run)}", name=name)
        if verdict in MARKS:
            kind = "skipped" if verdict == Verdict.UNDECIDED and checked.passed else "failure"
            counts[kind] += 1
            ElementTree.SubElement(case, kind, message=told).text = told
    suite.attrib |= {
        "tests": str(len(tests)),
        "failures": str(counts["failure"]),
        "skipped": str(counts["skipped"]),
        "errors": "0",
    }
    ElementTree.indent(suite)
    written: bytes = ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
    return written


def check_markdown(checked: CheckedRun) -> str:
    """Write the result as Markdown, e.g. for the summary of a step."""
    run, baseline = markdown_cell(checked.run), markdown_cell(checked.baseline)
    beside = f" against {baseline}" if baseline else ""
    lines = [
        f"### bitalloy check {run}{beside}: {'passed' if checked.passed else 'not passed'}",
        "",
        "| | verdict | |",
        "|---|---|---|",
    ]
    for name, verdict, told, words in _lines(checked):
        texts = map(markdown_cell, (name, words, told))
        lines.append(f"| {MARKS.get(verdict, '✅')} {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def failure_annotations(checked: CheckedRun) -> list[str]:
    """Write a workflow command of GitHub for each failure."""
    if checked.passed:
        return []
    return [f"::error title=bitalloy check::{_escaped(told)}" for _, v, told, _ in _lines(checked) if v in MARKS]


def _lines(checked: CheckedRun) -> Iterator[tuple[str, Verdict, str, str]]:
    """Name, verdict, what was found, and the verdict in words."""
    for limit in checked.limits:
        yield limit.name, limit.verdict, limit_text(limit), verdict_text(limit)
    for one in checked.against:
        name, told = f"{one.name} against baseline", difference_text(one)
        yield name, CHANGE_VERDICTS[one.change], told, one.change


def _escaped(text: str) -> str:
    """Escape what ends a workflow command."""
    return one_line(text).replace("%", "%25")
