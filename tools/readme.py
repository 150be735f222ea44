"""Run the commands of the console blocks of README.md and docs/ and put their real output below them.

``python tools/readme.py [PAGE ...]`` rewrites the pages, all where none is named; the tests run the same commands
and compare.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/tutorial.md", "docs/coming_from.md", "docs/formats.md")
BLOCK = re.compile(r"```console\n(.*?)```\n", re.DOTALL)
COMMAND = re.compile(r"^\$ ((?:.*\\\n)*.*)\n", re.MULTILINE)
TOOLS = ("python", "head", "cat", "ls")


@contextmanager
def workplace() -> Iterator[None]:
    """A temporary folder that holds models/ and tools/ as the checkout does."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("models", "tools"):
            shutil.copytree(ROOT / name, Path(folder) / name)
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def run(command: str) -> str:
    """What a command prints; raises RuntimeError where it fails (1 is diff's "different")."""
    words = shlex.split(command.replace("\\\n", " "))
    if words[0] == "caffe-lra":
        from lra.cli import main

        out = StringIO()
        with redirect_stdout(out):
            status = main(words[1:])
        printed = out.getvalue()
    elif words[0] in TOOLS:
        program = sys.executable if words[0] == "python" else words[0]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(
            [program, *words[1:]], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
        )
        status, printed = done.returncode, done.stdout
    else:
        raise RuntimeError(f"{command}: a page may run caffe-lra, {', '.join(TOOLS)}")
    if status not in (0, 1):
        raise RuntimeError(f"{command}: exit status {status}")
    return printed


def rendered(text: str) -> str:
    """A page with the output of every command brought up to date."""

    def block(match: re.Match[str]) -> str:
        commands = COMMAND.findall(match.group(1))
        lines = commands[:1] if commands[0].endswith(" demo") else commands
        return "```console\n" + "".join(f"$ {one}\n{run(one)}" for one in lines) + "```\n"

    with workplace():
        return BLOCK.sub(block, text)


def main() -> int:
    """Rewrite the pages."""
    sys.path.insert(0, str(ROOT))
    for name in sys.argv[1:] or PAGES:
        path = ROOT / name
        path.write_text(rendered(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
