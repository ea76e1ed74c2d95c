"""Rows of a text file: comma- or tab-separated values below a header, or a JSON object a line."""
from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

from pruning.data.faults import Faults, note

CAPTION = ("caption", "prompt", "text")  # the names that a column of captions may have
Row = Tuple[int, Dict[str, str]]  # number of the line, {name of a column: its value}


def read_rows(path: Path, faults: Faults, *columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a file that have all `columns`, and note the others.

    A name ending in .jsonl or .tsv says what the file is; any other file has comma-separated values. A row is one
    line, so that a quote that is not closed swallows no other row. Values of .tsv have no quotes, as in PartiPrompts.
    columns: for each the names that it may have; the row has it under the first. Capital letters do not matter.
    Raises OSError if the file cannot be read, and ValueError if its header lacks a column.
    """
    with open(path, encoding="utf-8-sig") as lines:
        rows = _objects(lines, faults) if path.suffix == ".jsonl" else \
            _separated(lines, faults, _by_tabs if path.suffix == ".tsv" else _by_commas, columns)
        for number, row in rows:
            found = [next((name for name in names if name in row), None) for names in columns]
            if None in found:
                note(faults, f"Lines skipped that have no {' or no '.join(names[0] for names in columns)}",
                     f"line {number}")
            else:
                yield number, {**row, **{names[0]: row[name] for names, name in zip(columns, found)}}


def _objects(lines, faults: Faults) -> Iterator[Row]:
    """Yield the texts and whole numbers of each JSON object."""
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            row = "none"
        if isinstance(row, dict):
            yield number, {name.lower(): str(value) for name, value in row.items() if type(value) in (str, int)}
        elif row is not None or line.strip():
            note(faults, "Lines skipped that are no JSON object", f"line {number}")


def _separated(lines, faults: Faults, split, columns: Sequence[Sequence[str]]) -> Iterator[Row]:
    header = [name.strip().lower() for name in split(next(lines, "")) or ()]
    for names in columns:
        if not set(names) & set(header):
            raise ValueError(f"its first line names no column {' or '.join(names)}")
    for number, line in enumerate(lines, 2):
        values = split(line)
        if values is None:
            note(faults, "Lines skipped that are no comma-separated values, such as those with an open quote",
                 f"line {number}")
        elif len(values) == len(header):
            yield number, dict(zip(header, values))
        elif line.strip():
            note(faults, "Lines skipped that have more or fewer values than the header; a value with commas needs "
                         "quotes", f"line {number}")


def _by_tabs(line: str) -> List[str]:
    return line.rstrip("\n").split("\t")


def _by_commas(line: str) -> Optional[List[str]]:
    """Return the comma-separated values of one line, None if it is malformed."""
    try:
        return next(csv.reader([line], strict=True), [])
    except csv.Error:
        return None
