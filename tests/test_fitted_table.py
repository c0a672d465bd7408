"""Tables of commands in terminals of 40, 80 and 120 columns: nothing cut, no word divided, no line too long."""

import re
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Group
from rich.table import Table

from exporter.commands.fitted_table import fitted_parts
from exporter.commands.main import cli
from exporter.commands.options import print_result

WIDTHS = (40, 80, 120)
LONG, FIVE, NINE = "beta-with-a-long-name", "  about: five", "  bytes: 9 kB"


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two artifacts of demo-llava that differ in recipe, bits and size."""
    folder = tmp_path_factory.mktemp("tables")
    names = [str(folder / name) for name in ("demo-llava-w4-vit8", "demo-llava-fp8-vit16")]
    for recipe, out in zip(("llava-w4-vit8", "llava-fp8-vit16"), names, strict=True):
        words = ["export", "--recipe", recipe, "--model", "demo-llava", "--samples", "4", "--out", out]
        done = CliRunner().invoke(cli, [*words, "--eval-samples", "4"], env={"COLUMNS": None})
        assert done.exit_code in (0, 5), done.output
    return names


def commands(artifacts: list[str]) -> dict[str, list[str]]:
    return {
        "recipes": ["recipes"],
        "datasets": ["datasets"],
        "dataset": ["datasets", "vqav2"],
        "plan": ["plan", "--recipe", "llava-w4-vit8", "--model", "demo-llava"],
        "tensors": ["plan", "--recipe", "llava-w4-vit8", "--model", "demo-llava", "--all"],
        "doctor": ["doctor"],
        "diff": ["diff", *artifacts],
        "evaluate": ["evaluate", artifacts[0]],
    }


def shown(words: list[str], width: int | None) -> str:
    """What a command prints to stdout in a terminal of this width; None: to a pipe."""
    done = CliRunner().invoke(cli, words, env={"COLUMNS": None if width is None else str(width)})
    assert done.exit_code in (0, 5), done.output
    return done.stdout


@pytest.mark.parametrize("name", commands(["", ""]))
def test_no_table_is_cut_or_divides_a_word(name: str, artifacts: list[str]) -> None:
    words = commands(artifacts)[name]
    wide = shown(words, None)
    assert max(map(len, wide.splitlines())) > 80, "a pipe gets whole lines"
    for width in WIDTHS:
        narrow = shown(words, width)
        assert "…" not in narrow
        # a figure of time or free memory may differ between two runs
        assert _stable(wide) <= _stable(narrow), width
        if name in ("recipes", "datasets"):
            assert max(len(line.rstrip()) for line in narrow.splitlines()) <= width


def _stable(text: str) -> set[str]:
    return {word for word in text.replace(":", " ").split() if not re.search(r"\d\.\d|^\d+$", word)}


def a_table(**kwargs: Any) -> Table:
    table = Table("name", "about", **kwargs)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_row("alpha", "one two three four", "1,234 kB")
    table.add_row("beta-with-a-long-name", "five", "9 kB")
    return table


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (
            60,
            [
                "name                   about                  bytes",
                "alpha                  one two three four  1,234 kB",
                "beta-with-a-long-name  five                    9 kB",
            ],
        ),
        (
            42,
            [
                "name                   about         bytes",
                "alpha                  one two    1,234 kB",
                "                       three",
                "                       four",
                "beta-with-a-long-name  five           9 kB",
            ],
        ),
        (
            30,
            ["name:", "alpha", "  about: one two three four", "  bytes: 1,234 kB", LONG, FIVE, NINE],
        ),
        (
            16,
            [
                "name:",
                "alpha",
                "  about: one two",
                "    three four",
                "  bytes: 1,234",
                "    kB",
                LONG,
                FIVE,
                NINE,
            ],
        ),
    ],
)
def test_a_table_narrows_at_words_and_then_becomes_lines(
    width: int, lines: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    print_result(Group("head", Group(a_table(title="a title of many words"))))
    head, *rest = capsys.readouterr().out.splitlines()
    title = " ".join(rest[: len(rest) - len(lines)])
    assert (head, title) == ("head", "a title of many words")
    assert [line.rstrip() for line in rest[len(rest) - len(lines) :]] == lines


@pytest.mark.parametrize(("width", "narrowed"), [(51, False), (50, True)])
def test_a_table_that_just_fits_is_not_narrowed(width: int, narrowed: bool) -> None:
    """21 characters, 18, 8, and two gaps of 2."""
    (table,) = fitted_parts(a_table(), width)
    assert isinstance(table, Table)
    assert [column.width for column in table.columns] == [21, 18 - narrowed, 8]
    (lines,) = fitted_parts(a_table(), 21 + 5 + 8 + 3)
    assert isinstance(lines, str)


def test_rows_without_names_become_lines_too() -> None:
    assert list(fitted_parts(a_table(show_header=False), 20)) == [
        "alpha\n  one two three four\n  1,234 kB\nbeta-with-a-long-name\n  five\n  9 kB"
    ]
