"""What the demo shows while it runs: progress bars and tables in a terminal, plain lines anywhere else."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


class Terminal:
    """Standard output; decides once whether a person is watching."""

    def __init__(self):
        self.console = Console(highlight=False)
        self.watched = self.console.is_terminal

    def line(self, text: str) -> None:
        """One line of text, not wrapped where nobody is watching."""
        self.console.print(escape(text), soft_wrap=not self.watched)

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        """A step of the job: yields what to call after each of `total` parts; says how long it took."""
        begin = time.perf_counter()
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True, disable=not self.watched) as progress:
            task = progress.add_task(escape(title), total=total)
            yield lambda: progress.advance(task)
        self.line(f"{title} ({time.perf_counter() - begin:.1f} s)")

    def table(self, header: list[str], rows: list[list[str]], wrong: list[bool]) -> None:
        """A table, the first column to the left; rows that are `wrong` in red."""
        if not self.watched:
            widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
            for line in [header, *rows]:
                pairs = enumerate(zip(line, widths, strict=True))
                cells = [cell.rjust(width) if index else cell.ljust(width) for index, (cell, width) in pairs]
                self.line("  " + "  ".join(cells).rstrip())
            return
        table = Table()
        for index, name in enumerate(header):
            table.add_column(name, justify="left" if index == 0 else "right")
        for row, bad in zip(rows, wrong, strict=True):
            table.add_row(*map(escape, row), style="bold red" if bad else None)
        self.console.print(table)
