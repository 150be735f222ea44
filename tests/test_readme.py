"""README.md shows what its commands really print."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import readme  # noqa: E402


def masked(text: str) -> list[str]:
    """Lines with times, ratios of times and versions replaced, and table widths collapsed."""
    lines, timed = [], False
    for line in text.splitlines():
        timed = line.startswith("model ") or (
            timed and line.strip() != "" and not line.startswith(("$", "```", "onnxruntime"))
        )
        if timed or line.startswith("onnxruntime"):
            line = re.sub(r"\d+(\.\d+)*", "#", line)
        lines.append(" ".join(line.split()))
    return lines


def test_console_blocks_show_real_output() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert masked(readme.rendered(text)) == masked(text)


def test_every_command_is_named() -> None:
    from lra.cli import cli

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in cli.commands:
        assert f"caffe-lra {name}" in text, name
