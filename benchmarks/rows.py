"""Results of long runs, saved one by one."""

import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd


def finished(output: Path, key: Sequence[str]) -> set[tuple[str, ...]]:
    """Values of the key columns of the rows that a file has; empty if it does not exist or is empty.

    Raises:
        ValueError: If it lacks a column, as the file of an earlier version may.
    """
    if not _is_begun(output):
        return set()
    rows = pd.read_csv(output, dtype=str)
    if missing := [name for name in key if name not in rows]:
        msg = f"{output} lacks the columns {', '.join(missing)}, so it cannot be continued; choose another output"
        raise ValueError(msg)
    return {*rows[[*key]].itertuples(index=False, name=None)}


def _is_begun(output: Path) -> bool:
    # An interrupted run may leave an empty file.
    return output.exists() and output.stat().st_size > 0


@contextmanager
def appended(output: Path, columns: Sequence[str]) -> Iterator[Callable[[dict[str, str]], None]]:
    """Append rows to a CSV file and print them, each as soon as it is added.

    Args:
        output: The file; created with a header if it does not exist.
        columns: Its columns; missing values stay empty.

    Yields:
        A function that adds a row.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    is_new = not _is_begun(output)
    with output.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        if is_new:
            writer.writeheader()
            file.flush()

        def add(row: dict[str, str]) -> None:
            writer.writerow(row)
            file.flush()
            print(row, flush=True)

        yield add
