"""Data sets that lie in a folder: one file of captions and one folder of images. Any such folder is a data set."""
from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

from pruning import UserError
from pruning.data.faults import Faults, note, sentences
from pruning.data.images import open_rgb
from pruning.data.rows import CAPTION, read_rows
from pruning.data.samples import Sample, Source

NOT_TEXT = r"\x00-\x1f\x7f-\x9f\ud800-\udfff"  # control characters, and halves of characters
# A plain file name, so that no name in a caption file leads out of the image folder.
IMAGE_NAME = rf"(?!.*\.\.)[^/\\:{NOT_TEXT}]{{1,250}}\.(jpe?g|png)"

# The same in folders below the image folder, as in Hugging Face's image folders.
IMAGE_PATH = rf"(?!.*\.\.)([^/\\:{NOT_TEXT}]{{1,250}}/){{0,9}}{IMAGE_NAME}"
LISTS = ("metadata.jsonl", "metadata.csv", "captions.txt")  # of captions; the last with commas and a header

Entry = Tuple[str, str, int, str]  # where it stands in the caption file, image name, order, caption


def read(data_dir: Optional[Path]) -> Source:
    """Return the images of a folder that its list of captions names, one of LISTS.

    Images lie beside the list, in a folder `Images` or `images`, or where the list says, below the folder. Raises
    UserError if no folder is given, or if the list is missing or malformed.
    """
    if data_dir is None:
        raise UserError(f"folder needs a folder of images with {' or '.join(LISTS)}: give it as --data_dir")
    path = first_in(data_dir, "captions", LISTS)
    images = first_in(data_dir, "images", ("Images/", "images/", "./")) if path.name == LISTS[-1] else data_dir
    captions, faults = read_captions(path, _entries, "a column file_name or image and a column text or caption",
                                     IMAGE_PATH)
    return folder_source(captions, images, faults)


def _entries(path: Path, faults: Faults) -> Iterator[Entry]:
    for number, row in read_rows(path, faults, ("file_name", "image"), CAPTION):
        yield f"line {number}", row["file_name"], number, row["caption"]


def first_in(folder: Path, what: str, names: Sequence[str]) -> Path:
    """Return the path of the first of `names` that exists in `folder`. A name that ends in a slash is a folder.

    Raises UserError if `folder` cannot be listed or all of the names are missing; `what` says in the message what they
    contain.
    """
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise UserError(f"cannot open the folder {folder} ({error.strerror}); it should contain the {what}") from None
    for name in names:
        if os.path.isdir(folder / name) if name.endswith("/") else os.path.isfile(folder / name):
            return folder / name
    raise UserError(f"there are no {what} in {folder}: expected {' or '.join(names)} in that folder")


def read_captions(path: Path, entries: Callable[[Path, Faults], Iterable[Entry]], expected: str,
                  names: str = IMAGE_NAME, fault: str = "their image has no plain name that ends in .jpg or .png"
                  ) -> Tuple[Dict[str, str], Faults]:
    """Return {image name: caption}, and what was skipped.

    `entries(path, faults)` yields what can be read of the file and notes the rest. An image keeps its caption of lowest
    order. names: the pattern of names that can be used; fault: what is wrong with others. Raises UserError if the file
    cannot be read or contains no caption; `expected` describes its format.
    """
    found: Dict[str, list] = {}
    faults: Faults = {}
    try:
        for where, name, order, caption in entries(path, faults):
            caption = " ".join(caption.split())
            if not re.fullmatch(names, name, re.IGNORECASE):
                note(faults, f"Captions skipped because {fault}", f"{where}: {name or 'no name'}")
            elif not caption:
                note(faults, "Captions skipped because they are empty", where)
            elif re.search(f"[{NOT_TEXT}]", caption):
                note(faults, "Captions skipped because they hold characters that are no text", where)
            else:
                found.setdefault(name, []).append((order, caption, where))
    # A malformed file leads the json module and what is read of it to any of these errors.
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"cannot read {path} ({str(error)[:200]}); expected {expected}, in UTF-8") from error
    if not found:
        said = f" ({' '.join(sentences(faults))})" if faults else ""
        raise UserError(f"there are no captions in {path}{said}; expected {expected}")
    return {name: _first_caption(captions, faults) for name, captions in found.items()}, faults


def _first_caption(captions: List[Tuple[int, str, str]], faults: Faults) -> str:
    """Return the caption of lowest order from (order, caption, where) of one image."""
    (lowest, first, _), *others = sorted(captions)
    for order, caption, where in others:
        if order == lowest and caption != first:
            note(faults, "Captions skipped because another one of their image has the same number", where)
    return first


def file_samples(captions: Dict[str, str], images: Path) -> List[Sample]:
    """Return one sample for each item of {image name: caption}; the image name is its id."""
    return [Sample(name, caption, partial(open_rgb, images / name), file=images / name)
            for name, caption in captions.items()]


def folder_source(captions: Dict[str, str], images: Path, faults: Faults) -> Source:
    """Return the source of a data set whose images the user has put into the folder `images`."""
    return Source(file_samples(captions, images), faults, _check_files, lambda sample: os.path.isfile(sample.file))


def _check_files(samples: List[Sample]) -> None:
    missing: Faults = {}
    for sample in samples:
        if not os.path.isfile(sample.file):
            note(missing, f"Images that have a caption but no readable file in {sample.file.parent}", sample.id)
    if missing:
        raise UserError(" ".join([*sentences(missing), "Add the files"]))
    alike: Dict[str, Sample] = {}
    for sample in samples:
        other = alike.setdefault(sample.id.casefold(), sample)
        if other is not sample and os.path.samefile(other.file, sample.file):
            raise UserError(f"{other.file} and {sample.id} have captions of their own, but are one file on this disk: "
                            "rename one in the captions and add its file")
