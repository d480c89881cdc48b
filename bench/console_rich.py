"""The benchmark's console by rich."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

#: Tables are not squeezed when the output is a file.
_FILE_WIDTH = 150


class RichConsole:
    """See :class:`~.console.Console`."""

    def __init__(self) -> None:
        self._console = Console()
        if not self._console.is_terminal:
            self._console = Console(width=_FILE_WIDTH)

    def print(self, text: str = "", /, *, highlight: bool = True) -> None:
        self._console.print(text, highlight=highlight)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], dim: Sequence[bool]) -> None:
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
        columns = (TextColumn("{task.description:45}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda text, steps: bar.update(task, description=text, advance=steps)
