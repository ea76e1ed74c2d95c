"""What all figures share: style, curves, axes, labels, titles, captions and files. No torch."""
from __future__ import annotations

import io
import math
import textwrap
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from pruning import whole_file
from pruning.metrics import METRICS
from pruning.records.findings import (
    ARROWS,
    GAP,
    SAME,
    feature_size,
    floor,
    images_of,
    last_good,
    paired_metrics,
    unreliable,
)
from pruning.records.palette import Line
from pruning.records.record import Record
from pruning.records.words import counted, listed

WIDTH = 8.3  # inches of every figure: at the 830 pixels of a page, a letter of 8 points is 11 pixels high
DPI = 200
VISIBLE = 1.0  # mean error of a palette, of 255, beyond which a figure keeps all its colours
SAFE, SAFE_TEXT = "#E3F1E3", "#3A6B3A"  # where nothing more is lost than the tolerance
STYLE = {
    "font.size": 9, "axes.titlesize": 9.5, "figure.titlesize": 10.5, "axes.labelsize": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "0.9", "axes.axisbelow": True,
    "lines.linewidth": 1.6, "lines.markersize": 5.5, "text.parse_math": False,  # a caption may hold a $
    "figure.facecolor": "white",  # also on a dark page
    "svg.fonttype": "none", "svg.hashsalt": "pruning",  # text stays text; the same figure gives the same file
}


# ---- figures

def panels(count: int) -> Tuple[Figure, list]:
    """Return a figure with `count` axes, three in a row."""
    columns = min(3, count) or 1
    rows = math.ceil(count / columns) or 1
    figure = Figure(figsize=(WIDTH, 2.1 * rows + 1), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG and beside it as SVG, each whole or not at all, and return the path of the PNG."""
    save_svg(figure, path.with_suffix(".svg"))
    return save_png(figure, path)


def save_svg(figure: Figure, path: Path) -> None:
    """Write a figure as SVG, which is the same whenever it is written."""
    _lay_out(figure)
    with whole_file(path) as part:
        figure.savefig(part, format="svg", metadata={"Date": None, "Creator": None})


def save_png(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, whole or not at all, and return its path.

    The file has a palette of 256 colours, which takes a third of the bytes, unless that changes the picture visibly.
    """
    _lay_out(figure)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI, pil_kwargs={"compress_level": 0})
    with Image.open(content) as image:
        full = image.convert("RGB")
    small = full.quantize(256, dither=Image.Dither.NONE)
    error = np.abs(np.asarray(small.convert("RGB"), np.int16) - np.asarray(full, np.int16)).mean()
    with whole_file(path) as part:
        (small if error < VISIBLE else full).save(part, format="PNG", dpi=(DPI, DPI))
    return path


def _lay_out(figure: Figure) -> None:
    """Place all parts of a figure for good, which takes most of the time of drawing."""
    if figure.get_layout_engine():
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


def title(figure, text: str) -> None:
    """Write a sentence or two above a figure, broken to its width."""
    figure.suptitle(textwrap.fill(text, 100, break_on_hyphens=False), x=0.01, ha="left")


def small_print(figure, *lines: str) -> None:
    """Write lines in small print below a figure, broken to its width."""
    figure.supxlabel("\n".join(textwrap.fill(line, 132, break_on_hyphens=False) for line in lines if line),
                     fontsize=8, color="0.3", x=0.01, ha="left")


def band_note(metrics: Sequence[str]) -> str:
    """Return what the bars and bands around the lines of these metrics are, in a sentence."""
    paired = paired_metrics(metrics)
    return ("Bars and bands: 95 % intervals" + (f" ({listed(paired)}: of the paired difference to dense)"
                                                if paired else "")
            + f"; pale lines: nothing was measured between, over more than {GAP:g}.")


def left_out_note(records: Sequence[Record], metrics: Sequence[str]) -> str:
    """Return which metrics are not drawn because there are too few images, in a sentence; "" if none is left out."""
    few = {name: record for record in records for name in metrics if unreliable(record, name)}
    return " ".join(f"{name} is left out: {counted(images_of(record), 'image')} are fewer than its "
                    f"{counted(feature_size(record, name), 'feature')}." for name, record in few.items())


# ---- curves

def curve(axes, x, y, ends, line: Line) -> None:
    """Draw a line with its intervals, (low, high) at each x; values that are NaN are gaps.

    Between points more than GAP apart the line is pale and has no band, because a band would claim to know what was
    not measured.
    """
    x, y, (low, high) = np.array(x, float), np.array(y, float), np.array(ends, float).reshape(-1, 2).T
    style, far = {"color": line.colour, "linestyle": line.dashes}, np.abs(np.diff(x)) > GAP + 1e-9
    for run in np.split(np.arange(len(x)), np.flatnonzero(far) + 1):
        axes.plot(x[run], y[run], **style)
        axes.fill_between(x[run], low[run], high[run], color=line.colour, alpha=0.18, linewidth=0)
    for i in np.flatnonzero(far):
        axes.plot(x[i:i + 2], y[i:i + 2], linewidth=0.8, alpha=0.45, **style)
    axes.vlines(x, low, high, color=line.colour, linewidth=0.9)
    axes.plot(x, y, linestyle="", clip_on=False, **marks(line))


def marks(line: Line) -> dict:
    """Return the keywords of matplotlib for the markers of a line."""
    return {"color": line.colour, "marker": line.marker, "markeredgewidth": 0.6 if line.filled else 1.2,
            "markerfacecolor": line.colour if line.filled else "white",
            "markeredgecolor": "white" if line.filled else line.colour}


def legend_entry(name: str, line: Line) -> Line2D:
    """Return what a legend needs to show a line."""
    return Line2D([], [], linestyle=line.dashes, label=name, **marks(line))


# ---- axes

def rate_axis(axes, rates, most: int = 4) -> None:
    """Lay out the x axis for rates, 0 being dense, with about as many labels as `most`."""
    last = max(rates, default=0.0)
    step = next(step for step in (0.05, 0.1, 0.2, 0.25, 0.5) if last <= (most + 0.5) * step + 1e-9)
    ticks = np.arange(0, last + 0.01, step)
    axes.set_xticks(ticks, ["dense" if tick == 0 else f"{tick:.2g}" for tick in ticks])
    axes.set_xlim(-0.03 * max(last, 0.1), 1.03 * max(last, 0.1))


def safe_zone(axes, record: Record, tolerance: float, top: bool) -> None:
    """Shade the rates up to the safe one, if there is one, and name them at the top or at the bottom.

    The axes must have their limits.
    """
    good = last_good(record, tolerance)
    if good:
        axes.axvspan(axes.get_xlim()[0], good.rate, color=SAFE, zorder=0, linewidth=0)
        axes.annotate("safe", (good.rate, int(top)), xycoords=("data", "axes fraction"), xytext=(-3, -2 if top else 3),
                      ha="right", va="top" if top else "bottom", textcoords="offset points", fontsize=8,
                      color=SAFE_TEXT)


def value_axis(axes, values, lowest: float = -math.inf) -> None:
    """Let the y axis show these values and little more, of which NaN are none."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    bottom, top = max(min(finite), lowest), max(finite)
    margin = 0.06 * (top - bottom) or 0.5 * abs(top) or 1
    axes.set_ylim(bottom - margin, top + margin)


def in_percent(axis) -> None:
    """Label an x or y axis of shares in percent."""
    axis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %".replace("-", "−"))


def level(axes, height: float) -> None:
    """Draw the dense model's value as a dotted horizontal line."""
    axes.axhline(height, color="0.4", linestyle=":", linewidth=1.2, zorder=1)


def ratio_note(records: Sequence[Record]) -> str:
    """Return what the ratios of times are, in a sentence or two."""
    unknown = [record.variant for record in records if not any(point.ratio_intervals for point in record.points)]
    whose = f" of {listed(unknown)}" if 0 < len(unknown) < len(records) else ""
    return (f"Times: measured in turn with dense; ratios within {100 * SAME:g} % of 1 are no difference."
            + (f" The records{whose} hold no intervals of times." if unknown else ""))


def noise_levels(record: Record, metric: str) -> Dict[str, List[float]]:
    """Return the heights of a metric for real images, and of what another noise seed changes; {} if neither is known.

    For a distance to the dense model's images that change is a distance too, for other metrics it is around dense.
    """
    real, spread, dense = floor(record, metric), record.dense.seed_spread.get(metric), record.dense.metrics[metric]
    levels = {} if real is None else {"real images": [real]}
    if spread is not None and METRICS[metric].against == "dense":
        levels["another seed"] = [spread]
    elif spread is not None and dense is not None:
        levels["another seed"] = [dense - spread, dense + spread]
    return levels


def draw_noise_levels(axes, record: Record, metric: str) -> None:
    """Draw noise_levels() as dashed lines with labels. The axes must have their limits."""
    bottom, top = axes.get_ylim()
    for text, heights in noise_levels(record, metric).items():
        for height in heights:
            axes.axhline(height, color="0.35", linestyle=(0, (6, 3)), linewidth=0.9, zorder=1)
        # Below the line for real images, where no curve is, if there is room between it and the x axis.
        below = text == "real images" and heights[-1] - bottom > 0.12 * (top - bottom)
        axes.annotate(text, (0, heights[-1]), xycoords=("axes fraction", "data"), xytext=(2, -2 if below else 1),
                      va="top" if below else "bottom", textcoords="offset points", fontsize=8, color="0.35")


def noise_note(records: Sequence[Record], metrics: Sequence[str]) -> str:
    """Return what the dashed lines of draw_noise_levels() are, in a sentence; "" if there are none."""
    words = {"real images": "the score of as many real images",
             "another seed": "the dense model with another noise seed"}
    found = {text for record in records for metric in metrics for text in noise_levels(record, metric)}
    return f"Dashed: {listed([words[text] for text in words if text in found])}." if found else ""


def metric_axis(axes, metric: str) -> None:
    """Name a metric, its unit and its better direction above its axes."""
    better, unit = METRICS[metric].better, METRICS[metric].unit
    axes.set_title(f"{metric} {ARROWS[better]} {better} is better")
    axes.set_ylabel(unit)


# ---- names at the ends of lines

def end_of(x, y, bottom: float = -math.inf) -> Tuple[float, float]:
    """Return the last point of a line that is finite, or where it falls below the bottom; (0, NaN) if there is none."""
    end = (0.0, math.nan)
    for x1, y1 in zip(x, y):
        if not (math.isfinite(x1) and math.isfinite(y1)):
            continue
        if y1 < bottom:
            x0, y0 = end if math.isfinite(end[1]) else (x1, y1)
            share = (y0 - bottom) / (y0 - y1) if y0 > bottom else 0.0
            return float(x0 + share * (x1 - x0)), bottom
        end = (float(x1), float(y1))
    return end


def label_ends(figure: Figure, *labelled) -> None:
    """Name lines at their ends, right of the axes, and push names apart so that they do not touch.

    labelled: pairs of axes and the (x, y, name, Line) of each line that ends in them. A name may have several lines.
    """
    figure.draw_without_rendering()  # the layout first: the gap between names depends on the height of the axes
    for axes, ends in labelled:
        finite = [end for end in ends if math.isfinite(end[1])]
        if finite:
            _label_axes(figure, axes, finite)
        else:
            axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", color="0.4")


def _label_axes(figure: Figure, axes, ends) -> None:
    ends = sorted(ends, key=lambda end: -end[0])  # of equal heights, the nearest end has the lowest name: none cross
    letter = 10.5 / (axes.get_window_extent().height / figure.dpi * 72)
    heights = [axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[1] for x, y, _, _ in ends]
    sizes = [letter * (1.2 + name.count("\n")) for _, _, name, _ in ends]
    for (x, y, name, line), height in zip(ends, spread(heights, sizes)):
        axes.annotate("", xy=(x, y), xytext=(1.04, height), textcoords="axes fraction", annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "color": "0.65", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2},
                      zorder=0.5)
        axes.plot(1.04, height, transform=axes.transAxes, clip_on=False, **marks(line))
        axes.annotate(name, xy=(1.04, height), xycoords="axes fraction", xytext=(6, 0), textcoords="offset points",
                      va="center", fontsize=8, linespacing=1.05, annotation_clip=False)


class Badge(NamedTuple):
    """A text in a large mark at a point."""

    x: float
    y: float
    text: str
    line: Line


def draw_badges(axes, badges: Sequence[Badge]) -> None:
    """Write texts into large marks at their points; one that would hide another stands above it, on a stem.

    The figure must have been laid out.
    """
    taken: List[Tuple[float, float]] = []
    for badge in sorted(badges, key=lambda badge: (badge.x, badge.y)):
        at = axes.transData.transform((badge.x, badge.y)) / axes.figure.dpi * 72
        lift = 0.0
        while any(abs(at[0] - x) < 26 and abs(at[1] + lift - y) < 15 for x, y in taken):
            lift += 3
        taken.append((at[0], at[1] + lift))
        light = np.dot(to_rgb(badge.line.colour), (0.3, 0.6, 0.1)) > 0.6
        at_point = {"xy": (badge.x, badge.y), "xytext": (0, lift), "textcoords": "offset points"}
        axes.annotate("", **at_point, zorder=4, arrowprops={"arrowstyle": "-", "color": badge.line.colour,
                                                            "shrinkA": 0, "shrinkB": 0})
        axes.annotate(badge.text, **at_point, ha="center", va="center", fontsize=8, fontweight="bold", zorder=5,
                      color="black" if light else "white", bbox={
                          "boxstyle": "round,pad=0.25", "facecolor": badge.line.colour, "edgecolor": "white"})


def spread(heights: Sequence[float], sizes: Sequence[float]) -> List[float]:
    """Return heights moved as little as lets things of these sizes stand in their order, and below 1 if possible."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    gap = {above: (sizes[below] + sizes[above]) / 2 for below, above in zip(order, order[1:])}
    for below, above in zip(order, order[1:]):
        placed[above] = max(placed[above], placed[below] + gap[above])
    placed[order[-1]] = min(placed[order[-1]], max(1.0, heights[order[-1]]))
    for below, above in reversed(list(zip(order, order[1:]))):
        placed[below] = min(placed[below], placed[above] - gap[above])
    return placed
