"""Prompts without original images: of a file, or PartiPrompts, fetched as needed."""
from __future__ import annotations

import os
from pathlib import Path
from typing import Iterator, Optional

from pruning import UserError, cache_folder
from pruning.data.faults import Faults, note
from pruning.data.fetching import downloader, fetch, fetching
from pruning.data.folders import NOT_TEXT, Entry, read_captions
from pruning.data.rows import CAPTION, read_rows
from pruning.data.samples import Sample, Source

# Yu et al., 2022. The commit keeps the prompts the same.
PARTI_URL = "https://raw.githubusercontent.com/google-research/parti/2c99f6652cbc7f0d0441aa91f4c7e7055bcb0071"
PARTI = "PartiPrompts.tsv"
PARTI_PROMPTS = 1600  # at least
ID_LENGTH = 250


def read(path: Optional[Path]) -> Source:
    """Return the prompts of a file: a text file with a prompt a line, or rows with a prompt and perhaps an id.

    A prompt without an id is known by the number of its line. Raises UserError if no file is given, or if the file
    cannot be read or holds no prompt.
    """
    if path is None:
        raise UserError("prompts are read from a file: give a .txt file with a prompt a line, or a .csv, .tsv or "
                        ".jsonl file with prompts and ids, as --data_dir")
    entries, expected = (_rows, "columns prompt and, if prompts have names, id") \
        if path.suffix in (".csv", ".tsv", ".jsonl") else (_lines, "a prompt a line")
    prompts, faults = read_captions(path, entries, expected, f"[^{NOT_TEXT}]{{1,{ID_LENGTH}}}",
                                    f"their id is no text of 1 to {ID_LENGTH} characters")
    return Source([Sample(name, prompt, None) for name, prompt in prompts.items()], faults)


def read_parti(path: Optional[Path]) -> Source:
    """Return PartiPrompts, fetched into the cache unless a file is given. Raises UserError if they cannot be had."""
    return read(_fetch_parti() if path is None else path)


def _lines(path: Path, faults: Faults) -> Iterator[Entry]:
    with open(path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"line {number}", f"{number:06d}", number, line


def _rows(path: Path, faults: Faults) -> Iterator[Entry]:
    seen = set()
    for number, row in read_rows(path, faults, ("prompt", *CAPTION)):
        name = row.get("id", f"{number:06d}")
        if name in seen:
            note(faults, "Prompts skipped because an earlier one has the same id", f"line {number}: {name}")
        else:
            seen.add(name)
            yield f"line {number}", name, number, row["prompt"]


def _fetch_parti() -> Path:
    """Fetch PartiPrompts unless the cache has them, and return their file."""
    url = (os.environ.get("PRUNING_PARTI_URL") or PARTI_URL).rstrip("/")
    folder = cache_folder() / "parti"

    def download_whole(address, path, pooch):
        downloader()(address, path, pooch)
        lines = Path(path).read_bytes().split(b"\n")
        if not lines[0].startswith(b"Prompt\t") or len(lines) <= PARTI_PROMPTS or lines[-1]:
            raise ValueError(f"{address} sent no complete list of prompts")  # pooch retries after a ValueError

    with fetching("PartiPrompts", f"download {url}/{PARTI} and give that file as --data_dir"):
        folder.mkdir(parents=True, exist_ok=True)
        return Path(fetch(url, folder, PARTI, None, download_whole))
