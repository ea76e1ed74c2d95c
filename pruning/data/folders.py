"""Data sets that lie in a folder: one file of captions and one folder of images."""
from __future__ import annotations

import csv
import re
from functools import partial
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Sequence, Tuple

from pruning import UserError
from pruning.data.images import open_rgb
from pruning.data.samples import Sample, Source

# A plain file name, so that no name in a caption file leads out of the image folder.
IMAGE_NAME = re.compile(r"(?!.*\.\.)[^/\\:\0]+\.(jpe?g|png)", re.IGNORECASE)


def first_in(folder: Path, what: str, names: Sequence[str]) -> Path:
    """Return the path of the first of `names` that exists in `folder`. A name that ends in a slash is a folder.

    Raises UserError if `folder` or all of the names are missing; `what` says in the message what they contain.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; it should contain the {what}")
    for name in names:
        if (folder / name).is_dir() if name.endswith("/") else (folder / name).is_file():
            return folder / name
    raise UserError(f"there are no {what} in {folder}: expected {' or '.join(names)} in that folder")


def read_captions(path: Path, entries: Callable[[Path], Iterable[Tuple[str, int, str]]],
                  expected: str) -> Tuple[Dict[str, str], int]:
    """Return {image name: caption} and the number of malformed captions that were skipped.

    `entries(path)` yields (image name, order, caption). An image keeps its caption of lowest order.
    Raises UserError if the file cannot be read or contains no caption; `expected` describes its format.
    """
    first, skipped = {}, 0
    try:
        for name, order, caption in entries(path):
            caption = " ".join(caption.split())
            if caption and IMAGE_NAME.fullmatch(name):
                first[name] = min(first.get(name, (order, caption)), (order, caption))
            else:
                skipped += 1
    # A malformed file leads pycocotools and the csv module to any of these errors.
    except (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError,
            csv.Error) as error:
        raise UserError(f"cannot read {path} ({str(error)[:200]}); expected {expected}") from error
    if not first:
        raise UserError(f"there are no captions in {path}; expected {expected}")
    return {name: caption for name, (_, caption) in first.items()}, skipped


def file_samples(captions: Dict[str, str], images: Path) -> List[Sample]:
    """Return one sample for each item of {image name: caption}; the image name is its id."""
    return [Sample(name, caption, partial(open_rgb, images / name), file=images / name)
            for name, caption in captions.items()]


def folder_source(captions: Dict[str, str], images: Path, skipped: int) -> Source:
    """Return the source of a data set whose images the user has put into the folder `images`."""
    return Source(file_samples(captions, images), skipped, _check_files, lambda sample: sample.file.is_file())


def _check_files(samples: List[Sample]) -> None:
    for sample in samples:
        if not sample.file.is_file():
            raise UserError(f"the image {sample.file} is missing although it has a caption: add the file")
