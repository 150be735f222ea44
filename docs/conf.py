"""Sphinx: ``sphinx-build -W -b html docs build/docs`` writes these pages, without a network.

Formulas become MathML, which browsers draw themselves.
"""

from __future__ import annotations

import re
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import caffe_proto  # noqa: E402

project = "caffe-lra"
author = "The caffe-lra authors"
copyright = f"2026, {author}"
version = release = caffe_proto.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["build"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
myst_dmath_double_inline = True
suppress_warnings = ["config.cache"]

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "caffe-lra"
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"
html_css_files = ["wide.css"]
html_static_path = ["_static"]
html_theme_options = {"source_edit_link": "", "navigation_with_keys": False}


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(tex2mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="formula">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


_FIELD = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*): (?=\S)")


def _docstring(_app: Any, _what: str, _name: str, _thing: Any, _options: Any, lines: list[str]) -> None:
    """Paragraphs of ``field: what it is`` become bullets, and bars outside of code stay bars."""
    made: list[str] = []
    for blank, paragraph in groupby(map(_escaped, lines), lambda line: not line.strip()):
        found = list(paragraph)
        fields = [_FIELD.match(line) for line in found]
        if (
            blank
            or not fields[0]
            or not all(field or line.startswith("    ") for field, line in zip(fields, found, strict=True))
        ):
            made += found
            continue
        for field, line in zip(fields, found, strict=True):
            made.append(f"- **{field[1]}**: {line[field.end() :]}" if field else f"  {line.strip()}")
    lines[:] = made


def _escaped(line: str) -> str:
    parts = line.split("``")
    parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
    return "``".join(parts)


def setup(app: Any) -> None:
    """Add the renderer of formulas."""
    app.connect("autodoc-process-docstring", _docstring, priority=400)
    app.add_html_math_renderer("mathml", inline_renderers=(_inline, None), block_renderers=(_block, None))
