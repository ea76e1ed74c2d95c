"""The images of records as small WebP files, together within a budget of bytes. No torch."""
from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

from PIL import Image

from pruning.records.findings import all_points, images_of, worst_images
from pruning.records.record import Record
from pruning.records.store import image_file

BUDGET = 3_300_000  # bytes of all files; base64 makes 4.4 MB of them, which leaves room for numbers in 5 MB
SHOWN = 32  # captions of a variant: the first, and for a quarter of them those whose images lose most
EDGES = (256, 96)  # pixels of the longer side: at most, and at least as long as fewer captions can make room
QUALITY = 80  # of WebP


class Thumbnails(NamedTuple):
    """Small images of several records."""

    files: List[str]  # WebP as base64, equal files once
    # variant -> position of a sample -> places in `files` of the images of dense and of each rate, None without one
    places: Dict[str, Dict[int, List[Optional[int]]]]
    unreadable: List[Path]  # images that are there and cannot be read


def thumbnails(found: Dict[Path, Record], budget: int = BUDGET) -> Thumbnails:
    """Return the images of the first captions of which any is kept, as large as the budget of bytes allows.

    found: records by path; the images of each lie in images/ beside it, as store.image_file says.
    """
    edge, most = EDGES[0], SHOWN
    while True:
        made = _encode(found, edge, most)
        size = sum(map(len, made.files)) * 3 / 4
        if size <= budget or most == 0:
            return made
        if edge > EDGES[1]:
            edge = max(EDGES[1], int(0.95 * edge * math.sqrt(budget / size)))
        else:
            most = min(most - 1, int(most * budget / size))


def _encode(found: Dict[Path, Record], edge: int, most: int) -> Thumbnails:
    made, place_of = Thumbnails([], {}, []), {}
    for path, record in found.items():
        rows = made.places[record.variant] = {}
        folder = path.parent / "images"
        files = {k: [image_file(folder, record.variant, point.rate, k) for point in all_points(record)]
                 for k in range(len(record.samples))}
        kept = [k for k, row in files.items() if any(file.is_file() for file in row)]
        for k in _chosen(record, kept, most):
            rows[k] = [_place(_webp(file, edge, made.unreadable), made.files, place_of) for file in files[k]]
    return made


def _chosen(record: Record, kept: List[int], most: int) -> List[int]:
    """Return which of the kept samples are shown, ascending."""
    _, order = worst_images(record, images_of(record))
    worst = [k for k in order if k in set(kept)][:most // 4]
    others = [k for k in kept if k not in worst]
    return sorted([*worst, *others[:most - len(worst)]])


def _place(webp: Optional[str], files: List[str], place_of: Dict[str, int]) -> Optional[int]:
    """Return the place of a file in `files`, where it is added if it is new; None for None."""
    if webp is not None and webp not in place_of:
        place_of[webp] = len(files)
        files.append(webp)
    return place_of.get(webp)


def _webp(file: Path, edge: int, unreadable: List[Path]) -> Optional[str]:
    if not file.is_file():
        return None
    try:
        with Image.open(file) as image:
            small = image.convert("RGB")
        small.thumbnail((edge, edge), Image.LANCZOS)
    except (OSError, SyntaxError, ValueError):
        unreadable.append(file)
        return None
    content = io.BytesIO()
    small.save(content, format="WEBP", quality=QUALITY)
    return base64.b64encode(content.getvalue()).decode()
