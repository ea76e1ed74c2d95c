"""Progress bars, and lines that say what happens, for those who watch a terminal."""
from __future__ import annotations

import sys

import tqdm as library

from pruning import distributed


class tqdm(library.tqdm):  # noqa: N801 - the name that everybody knows
    """A bar on terminals only: a file or a pipe would keep each of its states."""

    def __init__(self, *arguments, disable=None, **options):
        super().__init__(*arguments, disable=disable or None, **options)


def status(text: str) -> None:
    """Say on a terminal what happens now, in one of several processes."""
    if distributed.is_main and sys.stderr.isatty():
        print(f"{text} …", file=sys.stderr)
