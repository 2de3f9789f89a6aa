"""Pages that are made when the site is built: glossary, command line and Python of the code, benchmarks of records."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import bitalloy
from bitalloy.report.glossary import GLOSSARY


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put what the code says into the places that a page leaves for it."""
    for make in (glossary, commands, names, beginning, benchmarks):
        place = f"<!-- {make.__name__} -->"
        if place in markdown:
            markdown = markdown.replace(place, "\n".join(make()))
    return markdown


def glossary() -> Iterable[str]:
    """List the terms with their definitions."""
    for term, meaning in GLOSSARY.items():
        yield f"**{term}**\n:   {meaning}\n"


def commands() -> Iterable[str]:
    """List all commands with their arguments and options."""
    import typer

    from bitalloy.cli.main import app

    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        if command.hidden:
            continue
        yield f"## bitalloy {name}\n"
        yield f"```text\n{inspect.cleandoc(command.help or '').replace(chr(8), '')}\n```\n"
        yield "| option | what it does |\n|---|---|"
        for parameter in command.params:
            spelled = parameter.opts if parameter.opts[0].startswith("-") else [parameter.name]
            shown = ", ".join(f"`{name}`" for name in spelled)
            told = " ".join((getattr(parameter, "help", "") or "").split()).replace("|", "\\|")
            yield f"| {shown} | {told} |"
        yield ""


def names() -> Iterable[str]:
    """List all public names of the package with signature, docstring and example."""
    shown = examples()
    for name in bitalloy.__all__:
        found = getattr(bitalloy, name)
        told = inspect.getdoc(found)
        if inspect.ismodule(found) or told is None:
            continue
        try:
            signature = str(inspect.signature(found))
        except (TypeError, ValueError):
            signature = ""
        yield f"## {name}\n\n```python\nbitalloy.{name}{signature}\n```\n\n```text\n{told}\n```\n"
        if name in shown:
            yield f"```python\n{shown[name]}\n```\n"


def beginning() -> Iterable[str]:
    """Show what all examples of the Python reference rest on."""
    yield f"```python\n{examples()['']}\n```\n"


def examples() -> dict[str, str]:
    """Read public name -> its example in the Python reference; what all rest on has no name."""
    text = (Path(__file__).parent / "reference/examples.py").read_text()
    found = {}
    for part in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:
        names_, _, code = part.partition("\n")
        found |= {name.strip(): code.strip() for name in names_.split(",")}
    return found


def benchmarks() -> Iterable[str]:
    """Show the records in `benchmarks/results`."""
    folder = str(Path(__file__).parents[1] / "benchmarks")
    if folder not in sys.path:
        sys.path.append(folder)  # scripts are no package
    from bench_records import page

    yield from page()
