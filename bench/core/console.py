"""Printing: with rich where it is installed, else as plain text; and the formats of numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

_MARKUP = re.compile(r"\[/?(?:bold|dim)\]")
#: Columns of tables in a file, where the terminal's width means nothing.
_FILE_WIDTH = 150


def milliseconds(seconds: float) -> str:
    """Four digits, without an exponent."""
    ms = seconds * 1e3
    return f"{ms:.0f}" if ms >= 1000 else f"{ms:.4g}"


def spread(median: float | None, seconds: Sequence[float]) -> str:
    """Milliseconds: the median, and from least to most. A dash where there is no median."""
    if median is None:
        return "-"
    return f"{milliseconds(median)} ({milliseconds(min(seconds))}..{milliseconds(max(seconds))})"


def number(value: float | None, form: str = ".1e", unit: float = 1.0) -> str:
    """The value in units, or a dash."""
    return "-" if value is None else format(value / unit, form)


class Console:
    """Plain text."""

    def print(self, text: str = "", /, *, highlight: bool = True) -> None:
        """``highlight``: whether rich colours numbers and names."""
        print(_MARKUP.sub("", text))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], dim: Sequence[bool]) -> None:
        """Text on the left in the first and the last column, numbers on the right between; ``dim``: rows in a faint colour."""
        widths = [max(map(len, column)) for column in zip(columns, *rows)]
        last = len(columns) - 1
        print(title)
        for row in (columns, ["-" * width for width in widths], *rows):
            cells = (
                cell.ljust(width) if i in (0, last) else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
            )
            print("  ".join(cells).rstrip())

    @contextmanager
    def progress(self, total: int) -> Iterator[Callable[[str, int], None]]:
        """A context that yields a function of what happens next and how many of the steps are done; here no bar."""
        yield lambda text, steps: None


class RichConsole(Console):
    """Tables with lines, and a bar on the standard error. Raises ``ImportError`` where rich is not installed."""

    def __init__(self) -> None:
        from rich.console import Console as Rich

        self._console = Rich()
        if not self._console.is_terminal:
            self._console = Rich(width=_FILE_WIDTH)

    def print(self, text: str = "", /, *, highlight: bool = True) -> None:
        self._console.print(text, highlight=highlight)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], dim: Sequence[bool]) -> None:
        from rich.markup import escape
        from rich.table import Table

        result = Table(title=escape(title), title_justify="left", title_style="bold")
        result.add_column(columns[0], no_wrap=True)
        for name in columns[1:-1]:
            result.add_column(name, justify="right", no_wrap=True)
        result.add_column(columns[-1], overflow="fold")
        for row, is_dim in zip(rows, dim):
            result.add_row(*map(escape, row), style="dim" if is_dim else None)
        self._console.print(result)

    @contextmanager
    def progress(self, total: int) -> Iterator[Callable[[str, int], None]]:
        from rich.console import Console as Rich
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description:45}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"), TimeElapsedColumn())
        with Progress(*columns, console=Rich(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda text, steps: bar.update(task, description=text, advance=steps)


def make_console() -> Console:
    """By what is installed."""
    try:
        return RichConsole()
    except ImportError:
        return Console()
