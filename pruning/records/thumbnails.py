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
        rows = {record.variant: _rows(path.parent / "images", record, most) for path, record in found.items()}
        paths = [path for of_variant in rows.values() for row in of_variant.values() for path in row if path.is_file()]
        for tried in (paths[::16], paths):  # a few first, because many do not fit at full size
            made = {path: _webp(path, edge) for path in tried}
            size = sum(map(len, set(filter(None, made.values())))) * 3 / 4 * len(paths) / max(1, len(tried))
            if size > budget:
                break
        else:
            break
        if edge > EDGES[1]:
            edge = max(EDGES[1], int(0.95 * edge * math.sqrt(budget / size)))
        else:
            most = min(most - 1, int(most * budget / size))
    files = list(dict.fromkeys(filter(None, made.values())))
    place_of = {file: place for place, file in enumerate(files)}
    return Thumbnails(files, {variant: {k: [place_of.get(made.get(path)) for path in row] for k, row in each.items()}
                              for variant, each in rows.items()},
                      [path for path, file in made.items() if file is None])


def _rows(folder: Path, record: Record, most: int) -> Dict[int, List[Path]]:
    """Return the images of dense and of each rate of the samples that are shown, by the position of the sample."""
    rows = {k: [image_file(folder, record.variant, point.rate, k) for point in all_points(record)]
            for k in range(len(record.samples))}
    kept = {k: row for k, row in rows.items() if any(path.is_file() for path in row)}
    _, order = worst_images(record, images_of(record))
    worst = [k for k in order if k in kept][:most // 4]
    others = [k for k in kept if k not in worst]
    return {k: kept[k] for k in sorted([*worst, *others[:most - len(worst)]])}


def _webp(path: Path, edge: int) -> Optional[str]:
    """Return an image as WebP in base64, its longer side `edge` at most; None if it cannot be read."""
    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
        small.thumbnail((edge, edge), Image.LANCZOS)
    except (OSError, SyntaxError, ValueError):
        return None
    content = io.BytesIO()
    small.save(content, format="WEBP", quality=QUALITY, method=2)
    return base64.b64encode(content.getvalue()).decode()
