"""Sensitivities in parts: what `--shard` of `bitalloy sensitivity` does, and the command `bitalloy merge`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bitalloy.cli.collecting import collected
from bitalloy.cli.console import SHOWN_LINES, out_console, shown_progress
from bitalloy.cli.guard import limit_in_bytes
from bitalloy.cli.requests import MergeArguments, SensitivityArguments

if TYPE_CHECKING:
    from bitalloy.core.records import SensitivityTable, Settings
    from bitalloy.pipeline.shards import ShardReport
    from bitalloy.tasks.metric import MetricTable

OWN_OPTIONS = ("--shard", "--store")
"""Options in which the commands of the parts of a question differ."""


@collected(MergeArguments)
def merge_command(asked: MergeArguments) -> None:
    """Make one table of what the parts of a question found.

    Parts are those of `bitalloy sensitivity --shard`. Gathers their results in a run directory, and writes there what
    the same command without --shard would have written, bit by bit. Parts that are missing are named with the command
    that does them. Model and data must lie where the parts found them.

    For example:

      bitalloy merge /shared/store --out runs/model

      bitalloy merge store-1 store-2 store-3 --out runs/model --json
    """
    from bitalloy.pipeline.prepare import RunOptions
    from bitalloy.pipeline.shards import merge_shards

    with shown_progress(quiet=asked.quiet) as progress:
        options = RunOptions(progress=progress, memory_limit=limit_in_bytes(asked.memory_limit))
        question, table = merge_shards(asked.stores, out=asked.out, options=options)
    show_table(table, asked.out, sample=question.data is None, as_json=asked.json_output)


def do_part(asked: SensitivityArguments, settings: Settings) -> None:
    """Do one part of the work of `bitalloy sensitivity`, and tell how far all parts are."""
    from bitalloy.cli import options
    from bitalloy.pipeline.shards import run_shard, sharded_question

    found, store = options.shard(asked.shard, asked.store), asked.store
    assert found is not None and store is not None, "this is not called for the whole"
    opened = asked.opening.options(asked.analysis.limit)
    question = sharded_question(asked.model.model, asked.model.data, settings, asked.question(), opened)
    with asked.place.opened() as executor, shown_progress(quiet=asked.quiet) as progress:
        report = run_shard(
            question,
            *found,
            store=store,
            words=common_words(sys.argv[1:]),
            options=replace(opened, progress=progress, executor=executor),
        )
    if asked.json_output:
        from bitalloy.core.encoding import to_json

        sys.stdout.write(to_json(report, pretty=True).decode() + "\n")
    else:
        out_console.print(_told(report, store), soft_wrap=True, highlight=False)


def common_words(words: Sequence[str]) -> list[str]:
    """Leave out of the words of a command what tells a part from the others.

    >>> common_words(["sensitivity", "model.onnx", "--shard", "2/8", "--store=s", "--seed", "1"])
    ['sensitivity', 'model.onnx', '--seed', '1']
    """
    found, after = [], False
    for word in words:
        if not after and word.partition("=")[0] not in OWN_OPTIONS:
            found.append(word)
        after = word in OWN_OPTIONS
    return found


def show_table(table: SensitivityTable | MetricTable, folder: Path, *, sample: bool, as_json: bool) -> None:
    """Print a table of sensitivities.

    Args:
        table: the rows.
        folder: run directory, which has all rows.
        sample: whether they come from the embedded sample, which is told.
        as_json: whether they are printed as JSON.
    """
    from bitalloy.core.encoding import to_json
    from bitalloy.core.records import SensitivityTable
    from bitalloy.pipeline.prepare import SAMPLE_NOTE
    from bitalloy.report import text

    if as_json:
        sys.stdout.write(to_json(table, pretty=True).decode() + "\n")
        return
    given = table.given if isinstance(table, SensitivityTable) else ()
    for columns, lines in (text.readable(table), *([text.file_roundings(given)] if given else [])):
        out_console.table(columns, lines[:SHOWN_LINES])
        if len(lines) > SHOWN_LINES:
            out_console.print(f"{len(lines) - SHOWN_LINES} more in {folder}, or with --json.")
    if sample:
        out_console.print(SAMPLE_NOTE, style="yellow", soft_wrap=True)


def _told(report: ShardReport, store: Path) -> str:
    done = f"Part {report.part} of {report.parts} is done"
    if not report.stage:
        return f"{done}, and so are all others: `bitalloy merge {store}` makes the table."
    return (
        f"{done}: '{store}' has {report.there} of {report.total} results of the stage '{report.stage}'. When all parts "
        "are done, `bitalloy merge` with every store makes the table."
    )
