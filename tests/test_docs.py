"""docs/ builds without a warning, shows what its commands really print, and names no option that is not there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import click
import pytest
from test_readme import masked, readme

from lra.cli import cli

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
SHOWN = [name for name in readme.PAGES if name.startswith("docs/")]
NUMBER = re.compile(r"\d[\d,]*\.?\d*(?:e[+-]\d+)?")


def alike(found: str, shown: str) -> bool:
    """Whether two lines differ by no more than rounding does between machines: 3 % of a number with a fraction."""
    if NUMBER.sub("#", found) != NUMBER.sub("#", shown):
        return False
    pairs = zip(NUMBER.findall(found), NUMBER.findall(shown), strict=True)
    return all(one == two or _close(one, two) for one, two in pairs)


def _close(one: str, two: str) -> bool:
    if "." not in one or "." not in two:
        return False
    a, b = (float(number.replace(",", "")) for number in (one, two))
    return abs(a - b) <= max(0.03 * abs(b), 0.003)


@pytest.mark.parametrize("page", SHOWN)
def test_console_blocks_show_real_output(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "```console" in text
    for found, shown in zip_longest(masked(readme.rendered(text)), masked(text), fillvalue=""):
        assert alike(found, shown), f"{page}: run python tools/readme.py {page}\n- {shown}\n+ {found}"


def test_alike_tells_rounding_from_change() -> None:
    assert alike("top-1 0.9730", "top-1 0.9720") and alike("4.061e-02", "4.090e-02")
    assert not alike("top-1 0.9730", "top-1 0.8560")
    assert not alike("rank 16/100", "rank 17/100") and not alike("conv1 0.1", "conv2 0.1")
    assert not alike("744,200", "744,201")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages as a browser sees them, built with warnings as errors."""
    pytest.importorskip("sphinx", reason="needs the extra docs")
    pytest.importorskip("furo", reason="needs the extra docs")
    folder = tmp_path_factory.mktemp("docs")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-b",
        "html",
        "-d",
        f"{folder}/trees",
    ]
    built = subprocess.run([*command, str(DOCS), f"{folder}/html"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder / "html"


def test_pages_are_built(site: Path) -> None:
    for page in PAGES:
        assert (site / page.relative_to(DOCS)).with_suffix(".html").is_file()


def test_pages_need_no_network(site: Path) -> None:
    loaded = re.compile(r"""<(?:script|img|iframe)[^>]*src="(https?:)?//|<link[^>]*href="(https?:)?//""")
    for page in site.rglob("*.html"):
        assert not loaded.search(page.read_text(encoding="utf-8")), page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?https?:", sheet.read_text(encoding="utf-8")), sheet


def test_formulas_are_drawn_by_the_browser(site: Path) -> None:
    for page in sorted((DOCS / "methods").glob("*.md")):
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        html = (site / "methods" / page.name).with_suffix(".html").read_text(encoding="utf-8")
        assert html.count("<math") == len(re.findall(r"\$\$.+?\$\$|\$[^$]+\$", text, re.DOTALL)) > 0


def test_the_api_is_written_from_docstrings(site: Path) -> None:
    import caffe_proto
    import hrank
    import lra

    html = (site / "api.html").read_text(encoding="utf-8")
    for package in (caffe_proto, lra, hrank):
        for name in package.__all__:
            if name != "errors":
                assert f'id="{package.__name__}.{name}"' in html, f"{package.__name__}.{name}"


def commands(text: str) -> Iterator[list[str]]:
    """The words of every caffe-lra command of a page: in code blocks, console blocks and inline code."""
    inline = re.findall(r"`(caffe-lra [^`\n]+)`", text)
    fenced = "\n".join(re.findall(r"^```(?:bash|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    blocks = re.findall(r"^(?:\$ )?(caffe-lra (?:.*\\\n)*.*)$", fenced, re.MULTILINE)
    for command in [*inline, *blocks]:
        yield shlex.split(command.replace("\\\n", " ").split(" && ")[0], comments=True)[1:]


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(str(page.relative_to(ROOT)) for page in PAGES)]
)
def test_every_command_and_option_exists(page: str) -> None:
    for words in commands((ROOT / page).read_text(encoding="utf-8")):
        given: click.Command = cli
        while isinstance(given, click.Group) and words and not words[0].startswith("-"):
            if words[0].isupper():
                break
            assert words[0] in given.commands, f"{page}: caffe-lra {words[0]}"
            given = given.commands[words.pop(0)]
        known = {name for option in given.params for name in (*option.opts, *option.secondary_opts)}
        for word in words:
            if re.match(r"--?[a-z]", word):
                assert word.split("=")[0] in known | {"-h", "--help", "--version"}, (
                    f"{page}: {word} of {given.name}"
                )


def test_options_of_the_method_pages_exist() -> None:
    """Inline code that is an option alone, without its command, is an option of some command."""
    known = {
        name
        for command in cli.commands.values()
        for option in command.params
        for name in (*option.opts, *option.secondary_opts)
    }
    for page in [*sorted((DOCS / "methods").glob("*.md")), DOCS / "choosing.md", DOCS / "formats.md"]:
        for option in re.findall(r"`(--[a-z][a-z-]*)", page.read_text(encoding="utf-8")):
            assert option in known, f"{page.name}: {option}"


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"^([a-z_/]+)$", (DOCS / "index.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert {str(page.relative_to(DOCS).with_suffix("")) for page in PAGES} - {"index"} == listed


def test_what_contributing_names_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:caffe_proto|lra|hrank|tests|tools|models|docs)/[\w/.-]+)`", text):
        assert (ROOT / name).exists(), name
