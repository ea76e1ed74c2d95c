"""Flickr8k, from a folder in the layout of the original archives or of Kaggle's copy."""
from __future__ import annotations

import re
from pathlib import Path
from typing import Iterator, Optional

from pruning import UserError
from pruning.data.faults import Faults, note
from pruning.data.folders import Entry, first_in, folder_source, read_captions
from pruning.data.rows import read_rows
from pruning.data.samples import Source

KAGGLE_CAPTIONS = "captions.txt"
CAPTIONS = ("Flickr8k.token.txt", "Flickr8k_text/Flickr8k.token.txt", KAGGLE_CAPTIONS)
IMAGES = ("Flicker8k_Dataset/", "Flickr8k_Dataset/", "Images/", "images/")  # the original archive spells it "Flicker"


def read(data_dir: Optional[Path]) -> Source:
    """Return the samples of a Flickr8k folder; each image has its first caption.

    Raises UserError if no folder is given, or if the captions or the image folder are missing or malformed.
    """
    if data_dir is None:
        raise UserError("flickr8k cannot be fetched because its host no longer exists: unpack Flickr8k_Dataset.zip and "
                        "Flickr8k_text.zip (or Kaggle's adityajn105/flickr8k) into a folder and give it as --data_dir")
    path = first_in(data_dir, "Flickr8k captions", CAPTIONS)
    images = first_in(data_dir, "Flickr8k images", IMAGES)
    if path.name == KAGGLE_CAPTIONS:
        captions, faults = read_captions(path, _kaggle_entries,
                                         "a header image,caption and then rows such as 1.jpg,A dog .")
    else:
        captions, faults = read_captions(path, _token_entries, "lines such as 1.jpg#0<TAB>A dog .")
    return folder_source(captions, images, faults)


def _token_entries(path: Path, faults: Faults) -> Iterator[Entry]:
    """Yield (where, image name, order, caption) for each line `name.jpg#order<TAB>caption`."""
    with open(path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            match = re.fullmatch(r"([^\t]+)#(\d{1,9})\t(.*)", line.rstrip("\n"))
            if match:
                yield f"line {number}", match[1], int(match[2]), match[3]
            elif line.strip():
                note(faults, "Lines skipped that are not an image name, #, a number, a tab and a caption",
                     f"line {number}")


def _kaggle_entries(path: Path, faults: Faults) -> Iterator[Entry]:
    """Yield (where, image name, order, caption) for each row `name.jpg,caption` below the header."""
    for number, row in read_rows(path, faults, ("image",), ("caption",)):
        yield f"line {number}", row["image"], number, row["caption"]
