"""The figures of images: captions by rates of one record, and one caption by variants and rates. No torch."""
from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from pruning import UserError
from pruning.records.drawing import SAFE_TEXT, STYLE, WIDTH, save_png, small_print, title
from pruning.records.findings import (
    QUALITY,
    TOLERANCE,
    all_points,
    images_of,
    in_order,
    is_baseline,
    last_good,
    losses,
    named,
    saved_macs,
    worst_images,
)
from pruning.records.record import Point, Record
from pruning.records.store import image_file
from pruning.records.summaries import protocol
from pruning.records.words import percent, rate_label

ROWS, WORST = 6, 2  # of a record: the first captions, and those that lose most
VARIANTS, COLUMNS = 6, 10  # of a comparison: rows; of both: dense and rates at most
EDGE = 160  # pixels of an image
LEFT, RIGHT, HEAD = 1.5, 0.45, 0.17  # inches beside and above the images, for captions, losses and rates


class Row(NamedTuple):
    """A row of images: what stands left and right of it, and what above each image."""

    left: str
    files: Sequence[Path]
    heads: Sequence[str]
    framed: Optional[int] = None  # the place of the image at the safe rate
    right: str = ""
    failed: bool = False  # whether what stands right is a failure


@rc_context(STYLE)
def draw_images(record: Record, images_folder, path: Path, tolerance: float = TOLERANCE) -> Path | None:
    """Draw images of captions down the page, rates across: the first captions, and below them those that lose most.

    images_folder: laid out as store.image_file says. Returns None if there is no image of the record in the folder.
    Raises UserError for an image that cannot be read.
    """
    points, good = shown_points(record, tolerance), last_good(record, tolerance)
    point, worst = worst_images(record, WORST, tolerance)
    lost = losses(point, record.dense) if worst else None
    files = {k: [image_file(images_folder, record.variant, each.rate, k) for each in points]
             for k in shown_images(record, tolerance)}
    shown = [k for k, row in files.items() if any(file.is_file() for file in row)]
    if not shown:
        return None
    rows = [Row(record.samples[k % len(record.samples)]["caption"], files[k],
                [rate_label(each.rate) if k == shown[0] else "" for each in points],
                points.index(good) if good else None,
                "" if lost is None else f"−{percent(lost[k])}" if lost[k] >= 0.005 else "0 %",
                lost is not None and lost[k] > tolerance) for k in shown]
    figure = Figure(figsize=(WIDTH, height_of(rows) + 0.9), layout="constrained")
    draw_rows(figure.add_subplot(), rows)
    title(figure, f"{named(record)}, by rate"
                  + (f"; framed: safe, within {100 * tolerance:g} % of dense by {QUALITY}" if good else ""))
    below = sum(k in worst for k in shown)
    small_print(
        figure, f"{record.dataset}, {len(rows)} of {images_of(record)} images at each rate, {protocol(record)}. All "
                "images of a row start from the same noise.",
        "" if lost is None else f"Right: how much {QUALITY} the image loses at rate {point.rate:g}"
        + (f"; the last {below} lose most of all." if below > 1 else "; the last loses most." if below else "."))
    return save_png(figure, path)


def shown_images(record: Record, tolerance: float = TOLERANCE) -> List[int]:
    """Return the positions of the images that the figure shows: the first, then those that lose most at the answer."""
    _, worst = worst_images(record, WORST, tolerance)
    first = [k for k in range(min(ROWS, images_of(record))) if k not in worst]
    return [*first, *worst]


def shown_points(record: Record, tolerance: float) -> List[Point]:
    """Return dense and the points of the rates: all, or COLUMNS that are spread evenly and include the safe one."""
    points, good = all_points(record), last_good(record, tolerance)
    if len(points) <= COLUMNS:
        return points
    places = {round(place) for place in np.linspace(0, len(points) - 1, COLUMNS)}
    if good and points.index(good) not in places:
        places.remove(min(places - {0, len(points) - 1}, key=lambda place: abs(place - points.index(good))))
        places.add(points.index(good))
    return [points[place] for place in sorted(places)]


def variant_rows(found: Dict[Path, Record], tolerance: float) -> tuple:
    """Return the first caption of which images are there, and a row of its images for each of VARIANTS variants.

    Those that save most compute at their safe rates are shown. found: records by path; images/ lies beside each.
    """
    def gain(record):
        good = last_good(record, tolerance)
        return -saved_macs(good, record.dense) if good else 1.0

    paths = {record.variant: path for path, record in found.items()}
    records = sorted((record for record in found.values() if not is_baseline(record)), key=gain)
    for k in range(ROWS):
        rows = []
        for record in records:
            points, good = shown_points(record, tolerance), last_good(record, tolerance)
            folder = paths[record.variant].parent / "images"
            files = [image_file(folder, record.variant, point.rate, k) for point in points]
            if k < images_of(record) and any(file.is_file() for file in files):
                rows.append((record, Row(record.variant.replace("+", "\n+"), files,
                                         [rate_label(point.rate) for point in points],
                                         points.index(good) if good else None)))
        if rows:
            shown = {record.variant: row for record, row in rows[:VARIANTS]}
            caption = records[0].samples[k % len(records[0].samples)]["caption"]
            return caption, [shown[record.variant] for record in in_order(records) if record.variant in shown]
    return "", []


# ---- how rows are drawn

def height_of(rows: Sequence[Row], width: float = WIDTH) -> float:
    """Return the height in inches of rows that are so many inches wide."""
    return sum(_edge(rows, width) + _head(row) for row in rows)


def _edge(rows: Sequence[Row], width: float) -> float:
    """Return the inches from an image to the next."""
    return min(0.85, (width - LEFT - RIGHT) / max(len(row.files) for row in rows))


def _head(row: Row) -> float:
    return HEAD if any(row.heads) else 0.0


def draw_rows(axes, rows: Sequence[Row], width: float = WIDTH) -> None:
    """Draw rows of images below each other, in inches, with the image at the safe rate in a frame."""
    edge, top = _edge(rows, width), 0.0
    inner, columns = 0.94 * edge, max(len(row.files) for row in rows)
    for row in rows:
        top += _head(row)
        for place, (file, text) in enumerate(zip(row.files, row.heads)):
            x, y, safe = place * edge, top + 0.06 * edge, place == row.framed
            pixels = picture(file)
            tall, wide = (inner * pixel / max(pixels.shape[:2]) for pixel in pixels.shape[:2])
            axes.imshow(pixels, extent=(x, x + wide, y + tall, y), interpolation="antialiased")
            if safe:
                axes.add_patch(Rectangle((x, y), wide, tall, fill=False, edgecolor=SAFE_TEXT, linewidth=2.2))
            axes.text(x + inner / 2, top + 0.02, text, ha="center", va="bottom", fontsize=8,
                      color=SAFE_TEXT if safe else "black", fontweight="bold" if safe else "normal")
        middle = top + 0.06 * edge + inner / 2
        axes.text(-0.1, middle, _wrapped(row.left), ha="right", va="center", fontsize=8)
        axes.text(columns * edge + 0.05, middle, row.right, ha="left", va="center", fontsize=8,
                  fontweight="bold" if row.failed else "normal")
        top += edge
    axes.set_xlim(-LEFT, width - LEFT)
    axes.set_ylim(top + 0.03, 0)
    axes.set_aspect("equal", anchor="NW")
    axes.axis("off")


def _wrapped(text: str, lines: int = 4) -> str:
    return "\n".join(line for part in text.split("\n")
                     for line in textwrap.wrap(part, 26, max_lines=lines, placeholder=" …", break_on_hyphens=False))


def picture(file: Path) -> np.ndarray:
    """Return an image, uint8 (height, width, 3), EDGE at most; one pale grey pixel if there is no file.

    Raises UserError for a file that cannot be read.
    """
    if not file.is_file():
        return np.full((1, 1, 3), 235, np.uint8)
    try:
        with Image.open(file) as image:
            small = image.convert("RGB")
            small.thumbnail((EDGE, EDGE), Image.LANCZOS)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{file} is not a readable image ({error}); remove it or measure again") from None
    return np.asarray(small)
