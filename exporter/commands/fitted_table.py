"""Tables that fit the terminal: columns narrow at words, and a table too wide for that becomes lines of its cells."""

import textwrap
from collections.abc import Iterator

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Column, Table

GAP = 2  # characters between columns
INDENT = "  "


def fitted_parts(result: RenderableType, width: int) -> Iterator[RenderableType]:
    """The parts of a page; its tables fit `width` characters."""
    if isinstance(result, Group):
        for part in result.renderables:
            yield from fitted_parts(part, width)
    elif isinstance(result, Table):
        if result.title:
            yield "\n".join(wrapped(str(result.title), width))
            result.title = None
        yield fitted(result, width)
    else:
        yield result


def fitted(table: Table, width: int) -> Table | str:
    """The table with columns that are narrow enough; no word is divided and nothing is cut.

    Where the longest words alone are wider than `width`: for every row its first cell, and below it the other cells
    with the names of their columns.
    """
    table.box, table.pad_edge, table.padding = None, False, (0, GAP, 0, 0)
    longest = [_longest(column, table.show_header) for column in table.columns]
    shortest = [
        most if column.no_wrap else _longest_word(column, table.show_header)
        for column, most in zip(table.columns, longest, strict=True)
    ]
    room = width - GAP * (len(table.columns) - 1)
    if sum(shortest) > room:
        return "\n".join(_lines(table, width))
    widths = list(longest)
    while sum(widths) > room:
        spare = [have - least for have, least in zip(widths, shortest, strict=True)]
        widths[max(range(len(widths)), key=lambda i: (spare[i] > 0, widths[i]))] -= 1
    for column, characters in zip(table.columns, widths, strict=True):
        column.width, column.overflow = characters, "fold"
    return table


def _texts(column: Column, header: bool) -> list[str]:
    return [str(cell) for cell in ([column.header] if header else []) + list(column.cells)]


def _longest(column: Column, header: bool) -> int:
    return max((cell_len(line) for text in _texts(column, header) for line in text.splitlines()), default=0)


def _longest_word(column: Column, header: bool) -> int:
    return max((cell_len(word) for text in _texts(column, header) for word in text.split()), default=0)


def _lines(table: Table, width: int) -> Iterator[str]:
    """The name of the first column; every row as its first cell with a text, then name and value of the others."""
    names = [str(column.header) if table.show_header else "" for column in table.columns]
    if names[0]:
        yield f"{names[0]}:"
    for cells in zip(*(map(str, column.cells) for column in table.columns), strict=True):
        first, *others = [(name, cell) for name, cell in zip(names, cells, strict=True) if cell]
        yield from wrapped(first[1], width)
        for name, cell in others:
            yield from wrapped(f"{name}: {cell}" if name else cell, width, INDENT)


def wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """Lines of a text; a word that is longer than a line keeps a line of its own, which the terminal divides."""
    return [
        line
        for paragraph in text.splitlines()
        for line in textwrap.wrap(
            paragraph,
            width,
            initial_indent=indent,
            subsequent_indent=indent * 2,
            break_long_words=False,
            break_on_hyphens=False,
        )
    ]
