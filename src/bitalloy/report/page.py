"""What all HTML pages share: templates in which every name is text, and a policy that lets in nothing else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence

import jinja2

PLAIN_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1d1d1f; margin: 0 auto; max-width: 80rem; padding: 1rem; }
h1, h2, h3 { line-height: 1.2; } table { border-collapse: collapse; margin: .5rem 0 1.5rem; }
th, td { border: 1px solid #d0d0d6; padding: .25rem .5rem; text-align: left; vertical-align: top; }
.wide { overflow-x: auto; } svg text { font-size: 11px; }"""
"""The style of pages that are text, tables and small charts."""


def page_environment() -> jinja2.Environment:
    """Return the environment of the templates in this folder: it escapes by default, and refuses unknown names."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("bitalloy.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def content_policy(styles: Sequence[str], scripts: Sequence[str] = ()) -> str:
    """Content security policy: these styles, these scripts, images inside the page, nothing else."""

    def digests(texts: Sequence[str]) -> str:
        found = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
        return " ".join(f"'sha256-{digest}'" for digest in found) or "'none'"

    return f"default-src 'none'; img-src data:; style-src {digests(styles)}; script-src {digests(scripts)}"
