"""What all figures share: style, lines, axes, labels, captions and files. No torch."""
from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pruning import whole_file
from pruning.methods import METHODS
from pruning.metrics import METRICS
from pruning.records.findings import (
    ARROWS,
    SAME,
    TIMES,
    all_points,
    feature_size,
    floor,
    images_of,
    paired_metrics,
    time_ratio,
)
from pruning.records.record import Record
from pruning.records.summaries import bias_note, setup
from pruning.records.words import listed

STYLE = {
    "font.size": 10, "axes.titlesize": 10, "figure.titlesize": 12, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "0.9", "axes.axisbelow": True,
    "lines.linewidth": 1.6, "lines.markersize": 5.5, "text.parse_math": False,  # a caption may hold a $
}


class Line(NamedTuple):
    """How a variant or a metric is drawn."""

    colour: str
    marker: str
    dashes: str


# The first four are Paul Tol's high-contrast set, which stays distinct in grey and for the colour-blind.
LINES = (
    Line("#004488", "o", "-"), Line("#DDAA33", "s", "-"), Line("#BB5566", "^", "-"), Line("#000000", "D", "-"),
    Line("#44AA99", "v", "--"), Line("#882255", "P", "--"), Line("#88CCEE", "X", "--"), Line("#999933", "*", "--"),
    Line("#117733", "<", "-."), Line("#AA4499", ">", "-."), Line("#6699CC", "p", "-."), Line("#661100", "h", "-."),
)


def lines_of(names: Sequence[str], table) -> Dict[str, Line]:
    """Return a line for each name: names in the table keep theirs in every figure, others take the next lines."""
    lines = {}
    for i, name in enumerate([*table, *sorted(set(names) - set(table))]):
        line, turn = LINES[i % len(LINES)], i // len(LINES)
        lines[name] = line._replace(dashes=(line.dashes, ":")[min(turn, 1)])
    return lines


def variant_lines(records: Sequence[Record]) -> Dict[str, Line]:
    """Return a line for each variant. The default variant of a method has the method's line."""
    return lines_of([record.variant for record in records], METHODS)


def faded(line: Line) -> Line:
    """Return a line two thirds of the way to white, and dotted."""
    return line._replace(colour=to_hex([(2 + part) / 3 for part in to_rgb(line.colour)]), dashes=":")


# ---- figures

def panels(count: int, width: float = 4.2) -> Tuple[Figure, list]:
    """Return a figure with `count` axes, three in a row."""
    columns = min(3, count) or 1
    rows = math.ceil(count / columns) or 1
    figure = Figure(figsize=(max(4.8, width * columns), 2.9 * rows + 1), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, whole or not at all, and return its path."""
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=150)
    return path


def caption(figure: Figure, record: Record, metrics: Sequence[str], *notes: str) -> None:
    """Write below a figure where its numbers come from, and notes."""
    networks: Dict[str, List[str]] = {}
    for name in metrics:
        if name in record.backbones:
            networks.setdefault(record.backbones[name], []).append(name)
    used = "; ".join(f"{network} for {listed(names)}" for network, names in networks.items())
    small_print(figure, [
        f"{record.model}, {setup(record)}", f"Networks: {used}" if used else "",
        bias_note(record) if any(METRICS[name].biased for name in metrics) else "", *notes])


def small_print(figure: Figure, lines: Sequence[str]) -> None:
    """Write lines in small print below a figure, broken to its width."""
    width = int(16 * figure.get_figwidth())  # letters of this size to an inch
    figure.supxlabel("\n".join(textwrap.fill(line, width, break_on_hyphens=False) for line in lines if line),
                     fontsize=8, color="0.3", x=0.02, ha="left")


def band_note(metrics: Sequence[str]) -> str:
    """Return what the bands around the lines of these metrics are, in a sentence."""
    paired = paired_metrics(metrics)
    return "Bands: 95 % intervals" + (f" ({', '.join(paired)}: of the paired difference to dense)." if paired else ".")


# ---- axes

def rate_axis(axes, rates) -> None:
    """Lay out the x axis for rates, 0 being dense."""
    last = max(rates, default=0.0)
    ticks = np.arange(0, last + 0.05, 0.1 if last > 0.25 else 0.05)
    axes.set_xticks(ticks)
    axes.set_xticklabels(["0\ndense" if tick == 0 else f"{tick:.2g}\n" for tick in ticks])
    axes.set_xlim(-0.03 * max(last, 0.1), 1.03 * max(last, 0.1))


def metric_axis(axes, metric: str, values) -> None:
    """Lay out the y axis for a metric in its own unit, from 0 or from the lowest value below 0."""
    better, unit = METRICS[metric].better, METRICS[metric].unit
    finite = [value for value in values if math.isfinite(value)]
    top, bottom = max([0.0, *finite]), min([0.0, *finite])
    margin = 0.08 * (top - bottom) or 1
    axes.set_ylim(bottom - margin * (bottom < 0), top + margin)
    axes.set_title(f"{metric}  {ARROWS[better]} {better} is better")
    axes.set_ylabel(unit)


def plot(axes, x, y, line: Line) -> None:
    """Draw a line with markers; values that are NaN are gaps."""
    axes.plot(x, y, color=line.colour, marker=line.marker, linestyle=line.dashes, clip_on=False,
              markeredgecolor="white", markeredgewidth=0.6)


def legend_entry(name: str, line: Line) -> Line2D:
    """Return what a legend needs to show a line."""
    return Line2D([], [], color=line.colour, marker=line.marker, linestyle=line.dashes, label=name)


def band(axes, x, ends, line: Line) -> None:
    """Draw intervals, (low, high) at each x, as a band; an interval that is NaN is a gap."""
    low, high = np.array(ends, float).T
    axes.fill_between(x, low, high, color=line.colour, alpha=0.18, linewidth=0)


def ratios(record: Record, name: str) -> Tuple[np.ndarray, np.ndarray]:
    """Return one of TIMES as a ratio to dense at dense and each rate, (n,), and its intervals, (n, 2)."""
    found = np.array([time_ratio(name, point, record.dense) for point in all_points(record)])
    return found[:, 0], found[:, 1:]


def draw_ratios(axes, record: Record, name: str, line: Line) -> None:
    """Draw one of TIMES as a ratio to dense, with its 95 % intervals as bars; faded if the record has none."""
    rates = [point.rate for point in all_points(record)]
    values, ends = ratios(record, name)
    plot(axes, rates, values, line if np.isfinite(ends).any() else faded(line))
    axes.vlines(rates, *ends.T, color=line.colour, linewidth=1.2)


def ratio_axis(axes, name: str) -> None:
    """Lay out the y axis for one of TIMES as a ratio to dense, with dense's own time as a dotted line."""
    level(axes, 1)
    axes.set_ylim(0, max(1.15, axes.get_ylim()[1]))
    axes.set_title(f"{TIMES[name].title}  ↓ lower is better")
    axes.set_ylabel("÷ dense")


def ratio_note(records: Sequence[Record]) -> str:
    """Return what the ratios of times are, in a sentence or two."""
    unknown = [record.variant for record in records if not any(point.ratio_intervals for point in record.points)]
    whose = f" of {listed(unknown)}" if 0 < len(unknown) < len(records) else ""
    return ("Times: calls of the dense and the pruned denoiser in turn. Bars: 95 % intervals of the ratio; where a bar "
            f"comes within {100 * SAME:g} % of 1, no difference can be told."
            + (f" The records{whose} hold no intervals: their ratios are faded, and left out for masks, which do the "
               "same work as dense." if unknown else ""))


def level(axes, height: float) -> None:
    """Draw the dense model's value as a dotted horizontal line."""
    axes.axhline(height, color="0.4", linestyle=":", linewidth=1.2, zorder=1)


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
            axes.axhline(height, color="0.35", linestyle=(0, (6, 3)), linewidth=1, zorder=1)
        # Below the line for real images, where no curve is, if there is room between it and the x axis.
        below = text == "real images" and heights[-1] - bottom > 0.08 * (top - bottom)
        axes.annotate(text, (1, heights[-1]), xycoords=("axes fraction", "data"), xytext=(-2, -3 if below else 2),
                      ha="right", va="top" if below else "bottom", textcoords="offset points", fontsize=7.5,
                      color="0.35")


def noise_note(records: Sequence[Record], metrics: Sequence[str]) -> str:
    """Return what the dashed lines of draw_noise_levels() are, in a sentence; "" if there are none."""
    words = {"real images": "the score of as many real images",
             "another seed": "the dense model with another noise seed"}
    found = {text for record in records for metric in metrics for text in noise_levels(record, metric)}
    return f"Dashed: {listed([words[text] for text in words if text in found])}." if found else ""


def faded_note(axes, record: Record, metric: str) -> None:
    """Write into a panel why its lines are faded."""
    axes.text(0.03, 0.93, f"faded: {images_of(record)} images, {feature_size(record, metric)} features",
              transform=axes.transAxes, fontsize=8, color="0.3")


# ---- names at the ends of lines

def end_of(x, y) -> Tuple[float, float]:
    """Return the last point of a line that is finite; its height is NaN if there is none."""
    finite = [i for i in range(len(y)) if math.isfinite(y[i])]
    return (x[finite[-1]], y[finite[-1]]) if finite else (0.0, math.nan)


def label_ends(figure: Figure, *labelled) -> None:
    """Name lines at their ends, right of the axes, and push names apart so that they do not touch.

    labelled: pairs of axes and the (x, y, name, Line) of each line that ends in them.
    """
    figure.draw_without_rendering()  # the layout first: the gap between names depends on the height of the axes
    for axes, ends in labelled:
        finite = [end for end in ends if math.isfinite(end[1])]
        if finite:
            _label_axes(figure, axes, finite)
        else:
            axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", color="0.4")


def _label_axes(figure: Figure, axes, ends) -> None:
    gap = 13 / (axes.get_window_extent().height / figure.dpi * 72)
    heights = [axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[1] for x, y, _, _ in ends]
    for (x, y, name, line), height in zip(ends, spread(heights, gap)):
        axes.annotate("", xy=(x, y), xytext=(1.05, height), textcoords="axes fraction", annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "color": line.colour, "linestyle": ":", "linewidth": 0.8,
                                  "shrinkA": 0, "shrinkB": 0})
        axes.plot(1.05, height, transform=axes.transAxes, clip_on=False, color=line.colour, marker=line.marker)
        axes.annotate(name, xy=(1.05, height), xycoords="axes fraction", xytext=(7, 0), textcoords="offset points",
                      va="center", fontsize=9, annotation_clip=False)


def spread(heights: Sequence[float], gap: float) -> List[float]:
    """Return heights moved as little as keeps them `gap` apart in their order, and below 1 if possible."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    for below, above in zip(order, order[1:]):
        placed[above] = max(placed[above], placed[below] + gap)
    placed[order[-1]] = min(placed[order[-1]], max(1.0, heights[order[-1]]))
    for below, above in reversed(list(zip(order, order[1:]))):
        placed[below] = min(placed[below], placed[above] - gap)
    return placed
