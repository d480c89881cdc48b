"""Where the benchmark prints: by rich where it is installed, else plain text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

_MARKUP = re.compile(r"\[/?(?:bold|dim)\]")


class Console(Protocol):
    """What is used of ``rich.console.Console``, and the two things that take more than a line."""

    def print(self, text: str = "", /, *, highlight: bool = True) -> None: ...

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], dim: Sequence[bool]) -> None:
        """Text on the left in the first and the last column, numbers on the right between; ``dim``: rows without figures."""

    def progress(self, total: int) -> Any:
        """A context manager that yields a function: it is told what happens next, and how many steps are done with it."""


class PlainConsole:
    """Lines of text, and no bar."""

    def print(self, text: str = "", /, *, highlight: bool = True) -> None:
        print(_MARKUP.sub("", text))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], dim: Sequence[bool]) -> None:
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
        yield lambda text, steps: None


def make_console() -> Console:
    """By what is installed."""
    try:
        from .console_rich import RichConsole
    except ImportError:
        return PlainConsole()
    return RichConsole()
