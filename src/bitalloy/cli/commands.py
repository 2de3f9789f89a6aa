"""What all commands share: help with options in groups, and options that stand in a file."""

from __future__ import annotations

import functools
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from bitalloy.cli.config import effective_toml, read_config

PANELS = {
    "Model and data": (
        "model models name file run_directory runs stores first second data baseline shape scale mean std layout fit"
        " preprocess checkpoint trust_checkpoint image_size open_size"
    ),
    "Limits": (
        "latency size max_drop_db max_drop max_latency min_agreement confidence fail_on_miss allow_undecided front"
    ),
    "Evaluation": "evaluate metric limit",
    "Precision": "schemes keep exclude protect ranges weight_rounding equalize bias_correction",
    "Selection": "method mode units regions sites confirm",
    "Analysis": "effort samples probes calibration_samples seed",
    "Runtime": "target device workload here compiled memory_limit executor workers measure_on shard store",
    "Output": "out dry_run junit base_model json_output mlflow quiet",
    "Configuration": "config print_config",
}
"""Groups of options in `--help`, in their order -> names of parameters, in theirs."""
LISTS = ("--target", "--schemes")
"""Options that take a list as one text."""
OTHERS = "Options"
"""The group of what belongs to none of them, such as `--help`."""
NAME_COLUMNS = 26
"""Columns of the names of options; a longer one has a line of its own."""

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        is_eager=True,
        callback=read_config,
        exists=True,
        dir_okay=False,
        help="TOML file with a section for each command, such as [run], and its options by name. Default: "
        "bitalloy.toml of the current folder, where there is one. What is given on the command line comes first, then "
        "the file, then the defaults.",
    ),
]
"""Option for a file of options."""
PrintConfig = Annotated[
    bool,
    typer.Option("--print-config", help="Print all options that are in force as TOML, for bitalloy.toml, and stop."),
]
"""Option to print the options in force."""


class GroupedCommand(TyperCommand):
    """A command whose help shows options in groups, and never breaks or cuts the name of an option.

    An option that takes a list as one text is refused where it is given twice, in place of losing the first one.
    """

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Parse the command line."""
        words = [word.partition("=")[0] for word in args]
        for name in LISTS:
            if words.count(name) > 1:
                raise typer.BadParameter(f"{name} is given {words.count(name)} times. Give all in one: {name} a,b.")
        return super().parse_args(ctx, args)

    def format_help_text(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        """Write the text of the command; an indented paragraph is a line to be typed, which is wrapped as such."""
        for part in inspect.cleandoc(self.help or "").split("\n\n"):
            typed = part.startswith(" ")
            first, rest = ("    ", "        ") if typed else ("  ", "  ")
            lines = _wrapped(part, formatter.width - 3, first, rest)
            formatter.write("\n" + (" \\\n" if typed else "\n").join(lines) + "\n")

    def format_options(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        """Write the parameters by group."""
        known = {name: panel for panel, names in PANELS.items() for name in names.split()}
        order = {name: number for number, name in enumerate(known)}
        params = sorted(self.get_params(ctx), key=lambda param: order.get(str(param.name), len(order)))
        for panel in (*PANELS, OTHERS):
            records = [p.get_help_record(ctx) for p in params if known.get(str(p.name), OTHERS) == panel]
            found = [record for record in records if record is not None]
            if found:
                with formatter.section(panel):
                    for name, text in found:
                        formatter.write(_definition(name, text, formatter.width - 1))


def _definition(name: str, text: str, width: int) -> str:
    """Write an option beside what it does; a name too long for its column stands above.

    >>> print(_definition("--max-drop X", "Largest drop.", 60), end="")
      --max-drop X            Largest drop.
    """
    indent = " " * NAME_COLUMNS
    beside = len(name) + 4 <= NAME_COLUMNS
    first = f"  {name}".ljust(NAME_COLUMNS) if beside else indent
    lines = _wrapped(text, width, first, indent)
    return "".join(f"{line}\n" for line in (lines if beside else [f"  {name}", *lines]))


def _wrapped(text: str, width: int, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()), width, initial_indent=first, subsequent_indent=rest,
        break_on_hyphens=False, break_long_words=False,
    ) or [first.rstrip()]  # fmt: skip


def add_command(app: typer.Typer, name: str, command: Callable[..., None]) -> None:
    """Add a command to the program, with options that may stand in a file too.

    Args:
        app: the program.
        name: name of the command, and of its section in the file.
        command: a function whose parameters are annotated as typer ones.
    """

    @functools.wraps(command)
    def called(ctx: typer.Context, config: Path | None, print_config: bool, **values: Any) -> None:
        if print_config:
            typer.echo(effective_toml(ctx), nl=False)
        else:
            command(**values)

    signature, keyword = inspect.signature(command, eval_str=True), inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("ctx", keyword, annotation=typer.Context),
        *(p.replace(kind=keyword) for p in signature.parameters.values()),
        inspect.Parameter("config", keyword, default=None, annotation=ConfigFile),
        inspect.Parameter("print_config", keyword, default=False, annotation=PrintConfig),
    ]
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {p.name: p.annotation for p in parameters}
    app.command(name, cls=GroupedCommand)(called)
