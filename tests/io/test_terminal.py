"""What others wrote, shown: on a terminal, in tables, in Markdown, in errors and logs; each by its own renderer."""

import io
import re

import pytest
from markdown_it import MarkdownIt
from rich.console import Console
from rich.table import Table

from lcmlora import progress
from lcmlora.cli.registry import print_table
from lcmlora.cli.shell.reporting import reporting_errors
from lcmlora.errors import UserError
from lcmlora.flows import outcomes
from lcmlora.io import terminal

HOSTILE = [
    "\x1b[2J\x1b[31mred",
    "\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\",
    "\x9b31m",
    "a\rb",
    "a\x08\x08b",
    "a\u202egnp.exe",
    "a\u2028b",
    "\ud800",
    "\x00",
    "\x7f",
]
MARKUP = ["[red]x[/red]", "[link=http://evil]x[/link]", "[/]", "[bold", "\\[red]"]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_moves_colours_or_turns_is_spelled_out(text: str):
    shown = terminal.shown(text)
    assert shown.isprintable() and shown.encode()
    assert terminal.shown(f"{text} plain").endswith(" plain")


@pytest.mark.parametrize("text", ["emoji", "Füchse 🦊", "👩‍👩‍👧", "日本語", "می‌خواهم", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "a[1](2){3}", "C:\\x"])
def test_ordinary_text_stays_as_it_is(text: str):
    assert terminal.shown(text) == text


def test_what_is_long_keeps_its_beginning_and_its_end():
    shown = terminal.shown("a" * 50_000 + "z" * 50_000)
    assert len(shown) <= terminal.CELL and shown.startswith("aaa") and shown.endswith("zzz")
    assert "more" in shown
    assert len(terminal.lines("x\n" * 100_000)) == 101


@pytest.mark.parametrize("text", [*HOSTILE, *MARKUP, "x" * 100_000])
def test_a_table_shows_a_name_as_it_is_written(text: str, capsys: pytest.CaptureFixture):
    print_table(("name",), [(text,)])
    printed = capsys.readouterr().out
    outcomes.print_table([("emoji", text, text)], "total")
    printed += capsys.readouterr().out
    assert all(line.isprintable() for line in printed.split("\n"))
    assert len(printed) < 5000
    if text in MARKUP:
        assert printed.count(text) == 3


def test_an_error_line_is_told_as_text_and_not_without_end(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit), reporting_errors():
        raise UserError("\x1b[31m" + "x" * 100_000 + "\x1b[0m\nsecond \ud800 line")
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(r"error: \x1b[31mxxx") and len(first) < 2100 and first.isascii()
    assert second == r"error: second \ud800 line"


@pytest.mark.parametrize("terminal_there", [True, False])
def test_progress_shows_a_label_as_it_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, terminal_there: bool
):
    monkeypatch.setattr(progress, "_LOG_EVERY", 0.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal_there)
    list(progress.track(range(2), "[link=http://evil]\x07a"))
    said = capsys.readouterr().err
    assert r"[link=http://evil]\x07a" in said and "\x07" not in said


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "[x](javascript:alert(1))",
        "![x](http://evil/p.png)",
        "**b** *i* __b__ _i_ ~~s~~ `c`",
        "a|b",
        "# head",
        "1. one",
        "12) twelve",
        "---",
        "- item",
        "&lt;b&gt;",
        *HOSTILE,
    ],
)
def test_a_cell_of_markdown_is_text(text: str):
    page = outcomes.markdown(("name", "why"), [(text, "because")])
    html = MarkdownIt("gfm-like", {"linkify": False}).enable("table").render(page)
    (cell,) = re.findall(r"<td>(.*?)</td>\s*<td>because", html, re.DOTALL)
    assert "<" not in cell
    bullet = MarkdownIt("gfm-like", {"linkify": False}).render(f"* {terminal.markdown(text)}")
    assert set(re.findall(r"<(\w+)", bullet)) == {"ul", "li"}


def test_a_cell_of_rich_keeps_the_lines_of_a_reason():
    table = Table()
    table.add_row(terminal.cell("one\ntwo\x1b"))
    into = io.StringIO()
    Console(file=into, width=40).print(table)
    assert "one" in into.getvalue() and r"two\x1b" in into.getvalue()


def test_figures_and_names_stay_readable_in_the_source_of_markdown():
    for text in ("lcm-lora-a/1", "4.5", "-0.5", "student_4", "distill@b: step 7", "1.2.3", "2026-11-28T21:00Z"):
        assert terminal.markdown(text) == text
