"""Run the commands of README.md's console blocks and put their real output below them.

``python tools/readme.py`` rewrites README.md; the tests run the same commands and compare.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"```console\n(.*?)```\n", re.DOTALL)


@contextmanager
def workplace() -> Iterator[None]:
    """A temporary folder that holds models/ as the checkout does."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "models", Path(folder) / "models")
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def run(command: str) -> str:
    """What a ``caffe-lra ...`` command prints; raises RuntimeError where it fails (1 is diff's "different")."""
    from lra.cli import main

    out = StringIO()
    with redirect_stdout(out):
        status = main(command.split()[1:])
    if status not in (0, 1):
        raise RuntimeError(f"{command}: exit status {status}")
    return out.getvalue()


def rendered(text: str) -> str:
    """README text with the output of every command brought up to date."""

    def block(match: re.Match[str]) -> str:
        commands = [line[2:] for line in match.group(1).splitlines() if line.startswith("$ caffe-lra")]
        lines = [commands[0]] if commands[0].endswith(" demo") else commands
        return "```console\n" + "".join(f"$ {one}\n{run(one)}" for one in lines) + "```\n"

    with workplace():
        return BLOCK.sub(block, text)


def main() -> int:
    """Rewrite README.md."""
    sys.path.insert(0, str(ROOT))
    path = ROOT / "README.md"
    path.write_text(rendered(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
