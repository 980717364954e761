"""Where the command line draws: tables on stdout, progress on stderr."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from rmsnorm_np.cli.timing import Ratio


class _Stdout(Console):
    def on_broken_pipe(self) -> None:
        """Pass the error on: rich would exit with 1, which stands for a failed check here."""
        raise


def stdout() -> Console:
    """What the tables are printed on."""
    return _Stdout(highlight=False)


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; the function it gives is called with what comes next. Silent where stderr is no terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=total)
        started = False

        def step(description: str) -> None:
            nonlocal started
            bar.update(task, description=description, advance=1 if started else 0)
            started = True

        yield step


def table(*columns: str, left: int = 1) -> Table:
    """An empty table; the first ``left`` columns hold names, the others numbers."""
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="left" if index < left else "right", no_wrap=True)
    return drawn


def show(out: Console, title: str, drawn: Table, note: str | None = None) -> None:
    """Print a table under its title, and below it what the reader should know."""
    out.print(title, style="bold")
    out.print(drawn)
    if note is not None:
        out.print(note, style="dim")
    out.print()


def legend(out: Console, text: str) -> None:
    """Print what the reader should know about all the tables above."""
    out.print(text, style="dim")
    out.print()


def print_json(data: Any) -> None:
    """Pure JSON on stdout; dataclasses become objects."""
    print(json.dumps(data, default=_plain, indent=2, allow_nan=False))  # noqa: T201


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def seconds(value: float) -> str:
    """A duration with three digits and the unit that fits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{three_digits(value / scale)} {unit}"
    return f"{three_digits(value / 1e-6)} µs"


def ratio(value: Ratio) -> str:
    """A ratio with its spread over the rounds."""
    return f"{times(value.median)} ({three_digits(value.low)}–{three_digits(value.high)})"


def times(value: float) -> str:
    """A factor."""
    return f"{three_digits(value)}×"


def size(nbytes: int) -> str:
    """A number of bytes with the unit that fits."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= scale:
            return f"{nbytes / scale:.4g} {unit}"
    return f"{nbytes} bytes"


def three_digits(value: float) -> str:
    """A positive number of a table."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
