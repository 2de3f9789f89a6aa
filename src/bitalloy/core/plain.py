"""Names of strangers in texts for people and programs: one line, without what these would take for a command."""

from __future__ import annotations

import re
import unicodedata

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""What begins a formula in programs that open CSV."""
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~@:])")


def one_line(text: str) -> str:
    r"""Write control characters, ends of lines and marks of writing direction as escapes, so that a text is one line.

    >>> one_line("a\nb\x1b[31m")
    'a\\nb\\x1b[31m'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else ascii(c)[1:-1] for c in text)


def csv_cell(text: str) -> str:
    """Write a name for a cell of CSV: behind an apostrophe where a spreadsheet would take it for a formula.

    >>> csv_cell("=1+1"), csv_cell("conv/1")
    ("'=1+1", 'conv/1')
    """
    return f"'{one_line(text)}" if text.startswith(_FORMULA) else one_line(text)


def markdown_cell(text: str) -> str:
    r"""Write a text for a cell of a table in Markdown: nothing in it is markup, a link, a mention or HTML.

    >>> markdown_cell("a|<b>")
    'a\\|&lt;b&gt;'
    """
    shown = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\1", shown)
