"""Records -> figures. No torch, so that drawing starts at once.

Every figure is drawn from records alone, except the one that shows the images.
"""
from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from PIL import Image

from pruning import UserError, whole_file
from pruning.methods import METHODS
from pruning.metrics import METRICS
from pruning.records.findings import (
    ARROWS,
    COST,
    COSTS,
    QUALITY,
    TOLERANCE,
    WITHOUT_SHARE,
    all_points,
    counted,
    dense_cost,
    fid_is_empty,
    formula,
    images_of,
    in_order,
    interval,
    metrics_of,
    rate_folder,
    relative_curve,
    relative_interval,
    removes,
    saved_share,
    values_of,
)
from pruning.records.record import Record
from pruning.records.summaries import comparison_summary, fid_note, protocol, summary, units

ROWS, CELL = 6, 160  # of the figure of images: captions, and pixels an image

STYLE = {
    "font.size": 10, "axes.titlesize": 10, "figure.titlesize": 12, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "0.9", "axes.axisbelow": True,
    "lines.linewidth": 1.6, "lines.markersize": 5.5, "text.parse_math": False,  # a caption may hold a $
}


class Line(NamedTuple):
    """How a method or metric is drawn."""

    colour: str
    marker: str
    dashes: str


# The first four are Paul Tol's high-contrast set, which stays distinct in grey and for the colour-blind.
LINES = (
    Line("#004488", "o", "-"), Line("#DDAA33", "s", "-"), Line("#BB5566", "^", "-"), Line("#000000", "D", "-"),
    Line("#44AA99", "v", "--"), Line("#882255", "P", "--"), Line("#88CCEE", "X", "--"), Line("#999933", "*", "--"),
)


def _lines(names: Sequence[str], table) -> Dict[str, Line]:
    """A line for each name: those of the table keep theirs in every figure, others take the next."""
    ordered = [*table, *sorted(set(names) - set(table))]
    return {name: LINES[i % len(LINES)] for i, name in enumerate(ordered)}


# ---- figures

def _caption(figure: Figure, record: Record, metrics: Sequence[str], *notes: str) -> None:
    """Say in small print below a figure where its numbers come from."""
    used = "; ".join(f"{name}: {record.backbones[name]}" for name in metrics if name in record.backbones)
    lines = [f"{record.model} on {record.dataset}, {counted(images_of(record), 'image')} a rate, {protocol(record)}",
             f"networks: {used}" if used else "", fid_note(record) if "fid" in metrics else "", *notes]
    _small_print(figure, lines)


def _small_print(figure: Figure, lines: Sequence[str]) -> None:
    width = int(16 * figure.get_figwidth())  # letters of this size to an inch
    figure.supxlabel("\n".join(textwrap.fill(line, width, break_on_hyphens=False) for line in lines if line),
                     fontsize=8, color="0.3", x=0.02, ha="left")


def _save(figure: Figure, path: Path) -> Path:
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=150)
    return path


def _rate_axis(axes, rates) -> None:
    last = max(rates, default=0.0)
    ticks = np.arange(0, last + 0.05, 0.1 if last > 0.25 else 0.05)
    axes.set_xticks(ticks)
    axes.set_xticklabels(["0\ndense" if tick == 0 else f"{tick:.2g}\n" for tick in ticks])
    axes.set_xlim(-0.03 * max(last, 0.1), 1.03 * max(last, 0.1))


def _plot(axes, x, y, line: Line) -> None:
    axes.plot(x, y, color=line.colour, marker=line.marker, linestyle=line.dashes, clip_on=False,
              markeredgecolor="white", markeredgewidth=0.6)


def _label_ends(figure: Figure, *panels) -> None:
    """Name lines where they end, right of the axes, pushed apart so that no two names touch.

    panels: axes and the (x, y, name, Line) of each line that ends in it.
    """
    figure.draw_without_rendering()  # the layout first: the gap between names depends on the height of the axes
    for axes, ends in panels:
        finite = [end for end in ends if math.isfinite(end[1])]
        if finite:
            _label_panel(figure, axes, finite)
        else:
            axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", color="0.4")


def _label_panel(figure: Figure, axes, ends) -> None:
    gap = 13 / (axes.get_window_extent().height / figure.dpi * 72)
    heights = [axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[1] for x, y, _, _ in ends]
    for (x, y, name, line), height in zip(ends, _spread(heights, gap)):
        axes.annotate("", xy=(x, y), xytext=(1.05, height), textcoords="axes fraction", annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "color": line.colour, "linestyle": ":", "linewidth": 0.8,
                                  "shrinkA": 0, "shrinkB": 0})
        axes.plot(1.05, height, transform=axes.transAxes, clip_on=False, color=line.colour, marker=line.marker)
        axes.annotate(name, xy=(1.05, height), xycoords="axes fraction", xytext=(7, 0), textcoords="offset points",
                      va="center", fontsize=9, annotation_clip=False)


def _spread(heights: Sequence[float], gap: float) -> List[float]:
    """Heights moved as little as keeps them `gap` apart in their order, and below 1 if that can be."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    for below, above in zip(order, order[1:]):
        placed[above] = max(placed[above], placed[below] + gap)
    placed[order[-1]] = min(placed[order[-1]], max(1.0, heights[order[-1]]))
    for below, above in reversed(list(zip(order, order[1:]))):
        placed[below] = min(placed[below], placed[above] - gap)
    return placed


def _end(x, y) -> tuple:
    """The last point of a line that has a value."""
    finite = [i for i in range(len(y)) if math.isfinite(y[i])]
    return (x[finite[-1]], y[finite[-1]]) if finite else (0.0, math.nan)


@rc_context(STYLE)
def draw_accuracy(record: Record, path: Path, tolerance: float = TOLERANCE) -> Path:
    """The main graph: every quality metric relative to the dense model over the rate, up is better."""
    points = all_points(record)
    rates = [point.rate for point in points]
    metrics = [name for name in metrics_of(record) if name != COST and name not in WITHOUT_SHARE]
    lines = _lines(metrics, METRICS)
    if fid_is_empty(record):
        lines["fid"] = _faded(lines["fid"])
    curves = {name: relative_curve(record, name) for name in metrics}
    undrawn = [name for name in metrics if not np.isfinite(curves[name]).any()]
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    axes = figure.add_subplot()
    for name in metrics:
        _band(axes, rates, [relative_interval(name, point, record.dense) for point in points], lines[name])
        _plot(axes, rates, curves[name], lines[name])
    axes.axhline(1, color="0.4", linestyle=":", linewidth=1.2, zorder=1)
    if QUALITY in metrics:
        axes.axhline(1 - tolerance, color=lines[QUALITY].colour, linestyle=(0, (1, 3)), linewidth=1, zorder=1)
    finite = [value for curve in curves.values() for value in curve if math.isfinite(value)]
    axes.set_ylim(min([0.0, *finite]) - 0.03, max([1.1, *(1.05 * value for value in finite)]))
    _rate_axis(axes, rates)
    axes.set_xlabel(f"pruning rate (share of {record.dense.unit} asked for)", labelpad=-9)
    axes.set_ylabel("accuracy relative to the dense model\n(↑ is better, dense = 1, dotted)")
    figure.suptitle(f"{record.method} pruning of {record.model}")
    apart = [name for name in WITHOUT_SHARE if name in record.dense.metrics]
    _caption(
        figure, record, metrics,
        "Each line is normalised as its name says. Bands: 95 % intervals (clip_score, lpips: of the paired difference "
        "to dense)." + (f" Second dotted line: {100 * tolerance:g} % less {QUALITY} than dense."
                        if QUALITY in metrics else "") + " A gap: not finite.",
        f"In panels of their own, as a share of dense says nothing: {', '.join(apart)}." if apart else "",
        f"Not drawn, for want of a dense value above 0: {', '.join(undrawn)}." if undrawn else "")
    _label_ends(figure, (axes, [(*_end(rates, curves[name]), formula(name), lines[name]) for name in metrics]))
    return _save(figure, path)


@rc_context(STYLE)
def draw_metrics(record: Record, path: Path) -> Path:
    """A panel a metric in its own unit, with an arrow for the better direction; dense is dotted."""
    points, metrics = all_points(record), metrics_of(record)
    rates = [point.rate for point in points]
    line = _lines([record.method], METHODS)[record.method]
    figure, panels = _panels(len(metrics))
    for axes, name in zip(panels, metrics):
        values, ends = values_of(record, name), [interval(name, point, record.dense) for point in points]
        _plot(axes, rates, values, _faded(line) if name == "fid" and fid_is_empty(record) else line)
        _band(axes, rates, ends, line)
        if math.isfinite(values[0]):
            axes.axhline(values[0], color="0.4", linestyle=":", linewidth=1.2, zorder=1)
        drawn = [*values, *np.ravel(ends), *_limits(axes, record, name)]
        _rate_axis(axes, rates)
        _metric_axis(axes, name, drawn)
        if name == "fid" and fid_is_empty(record):
            _say_faded(axes, record)
    figure.suptitle(f"{record.method} pruning of {record.model}")
    _caption(figure, record, metrics, f"x: pruning rate, share of {record.dense.unit} asked for. Dotted: the dense "
             "model. Band: 95 % interval; for clip_score and lpips of the paired difference to dense. Dashed: what "
             "as many real images score, or what the dense model has under another noise seed. A gap: not finite.")
    return _save(figure, path)


def _limits(axes, record: Record, metric: str) -> List[float]:
    """Draw what a change must exceed to be one: the floor of a distance, the spread over seeds. Their heights."""
    floor, spread = (record.notes.get(kind, {}).get(metric) for kind in ("floors", "seed_spread"))
    heights = [] if floor is None else [floor]
    if spread is not None:
        paired = METRICS[metric].interval == "difference"
        heights += [record.dense.metrics[metric] + sign * spread for sign in (-1, 1)] if paired else [spread]
    for height in heights:
        axes.axhline(height, color="0.35", linestyle=(0, (6, 3)), linewidth=1, zorder=1)
    for text, height in (("real images", floor), ("another seed", heights[-1] if spread is not None else None)):
        if height is not None:
            below = height == floor  # where no curve can be
            axes.annotate(text, (1, height), xycoords=("axes fraction", "data"), xytext=(-2, -3 if below else 2),
                          ha="right", va="top" if below else "bottom", textcoords="offset points", fontsize=7.5,
                          color="0.35")
    return heights


def _band(axes, x, ends, line: Line) -> None:
    """The 95 % intervals around a line; nothing where there is none."""
    low, high = np.array(ends, float).T
    axes.fill_between(x, low, high, color=line.colour, alpha=0.18, linewidth=0)


def _faded(line: Line) -> Line:
    """Two thirds of the way to white, and dotted."""
    return line._replace(colour=to_hex([(2 + part) / 3 for part in to_rgb(line.colour)]), dashes=":")


def _say_faded(axes, record: Record) -> None:
    axes.text(0.03, 0.93, f"faded: {images_of(record)} images, {record.notes['fid_feature_size']} features",
              transform=axes.transAxes, fontsize=8, color="0.3")


def _panels(count: int, width: float = 4.2):
    columns = min(3, count) or 1
    rows = math.ceil(count / columns) or 1
    figure = Figure(figsize=(max(4.8, width * columns), 2.9 * rows + 1), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


def _metric_axis(axes, metric: str, values) -> None:
    """The y axis of a metric in its own unit, from 0 or from the lowest value below it."""
    better, unit = METRICS[metric].better, METRICS[metric].unit
    finite = [value for value in values if math.isfinite(value)]
    top, bottom = max([0.0, *finite]), min([0.0, *finite])
    margin = 0.08 * (top - bottom) or 1
    axes.set_ylim(bottom - margin * (bottom < 0), top + margin)
    axes.set_title(f"{metric}  {ARROWS[better]} {better} is better")
    axes.set_ylabel(unit)


@rc_context(STYLE)
def draw_cost(record: Record, path: Path) -> Path:
    """A panel a cost in its own unit, lower is better, with the dense model's beside it."""
    points = all_points(record)
    rates = [point.rate for point in points]
    line = _lines([record.method], METHODS)[record.method]
    figure = Figure(figsize=(11, 6.8), layout="constrained")
    for i, (name, cost) in enumerate(COSTS.items()):
        axes = figure.add_subplot(2, 3, i + 1)
        values = cost.scale * np.array([getattr(point, name) for point in points])
        dense = cost.scale * np.array([dense_cost(name, point, record.dense) for point in points])
        axes.plot(rates, dense, color="0.4", linestyle=":", linewidth=1.2, marker="." if cost.dense else None, zorder=1)
        _plot(axes, rates, values, line)
        if name == "parameters" and not removes(record):
            kept = cost.scale * np.array([point.nonzero_parameters for point in points])
            _plot(axes, rates, kept, line._replace(colour="0.55", marker="v", dashes="--"))
            axes.text(rates[-1], kept[-1], "not zero ", ha="right", va="top", fontsize=9, color="0.35")
        if cost.dense and not removes(record):
            axes.text(0.5, 0.05, "no speed-up on dense kernels", transform=axes.transAxes, ha="center", color="0.35")
        axes.set_ylim(0, 1.15 * max([*values, *dense]) or 1)
        _rate_axis(axes, rates)
        axes.set_title(f"{cost.title}  ↓ lower is better")
        axes.set_ylabel(cost.unit)
    figure.suptitle(f"What {record.method} pruning of {record.model} saves")
    _small_print(figure, [
        f"{record.model} on {record.settings['device']}, {protocol(record)}, "
        f"batches of {record.settings.get('batch_size', '?')}",
        f"x: pruning rate, share of {record.dense.unit} asked for. Dotted: the dense model; its calls were timed in "
        "turn with the pruned one's at each rate (medians), and its image is the pruned one's with dense calls. Peak "
        "memory: weights and the most that a call holds besides."])
    return _save(figure, path)


@rc_context(STYLE)
def draw_images(record: Record, images_folder, path: Path) -> Path | None:
    """The same captions down the page and rates across; None where the folder has no image of the record.

    images_folder: holds the images of a rate as <method>/<rate or 'dense'>/<position in samples>.png.
    """
    rates = [point.rate for point in all_points(record)]
    files = [[Path(images_folder) / record.method / rate_folder(rate) / f"{k:04d}.png" for rate in rates]
             for k in range(len(record.samples))]
    rows = [k for k, row in enumerate(files) if any(file.is_file() for file in row)][:ROWS]
    if not rows:
        return None
    page = np.vstack([np.hstack([_cell(file) for file in files[k]]) for k in rows])
    width, height = len(rates) * 0.92 + 2.3, len(rows) * 0.92 + 1.3
    figure = Figure(figsize=(max(width, 5.5), height), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(page, interpolation="antialiased")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    axes.set_xticks([(i + 0.5) * CELL for i in range(len(rates))])
    axes.set_xticklabels([rate_folder(rate) for rate in rates])
    axes.set_yticks([(i + 0.5) * CELL for i in range(len(rows))])
    axes.set_yticklabels([textwrap.fill(textwrap.shorten(record.samples[k]["caption"], 100), 26) for k in rows],
                         fontsize=8)
    figure.suptitle(f"{record.method} pruning of {record.model}, by pruning rate")
    _small_print(figure, [
        f"{record.dataset}, {len(rows)} of {counted(images_of(record), 'image')} a rate, {protocol(record)}. "
        "A row starts from the same noise at every rate."])
    return _save(figure, path)


def _cell(file: Path) -> np.ndarray:
    """An image in a white frame, (CELL, CELL, 3); pale grey where there is no file."""
    cell = np.full((CELL, CELL, 3), 255, np.uint8)
    inner = CELL - 6
    if not file.is_file():
        cell[3:-3, 3:-3] = 235
        return cell
    try:
        with Image.open(file) as image:
            cell[3:-3, 3:-3] = np.asarray(image.convert("RGB").resize((inner, inner), Image.LANCZOS))
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{file} is no image that can be read ({error}); remove it or measure again") from None
    return cell


@rc_context(STYLE)
def draw_comparison(records: Sequence[Record], path: Path, warning: str = "") -> Path:
    """All methods in one panel a metric, and QUALITY over what each really removed or zeroed.

    The records share a protocol (records.protocol_differences), or the warning says how they do not.
    """
    records = in_order(records)
    lines = _lines([record.method for record in records], METHODS)
    metrics = metrics_of(records[0])
    figure, panels = _panels(len(metrics) + (QUALITY in metrics), width=5)
    labels = []
    for axes, name in zip(panels, metrics):
        curves = {record.method: ([p.rate for p in all_points(record)], values_of(record, name)) for record in records}
        drawn = list(np.concatenate([values for _, values in curves.values()]))
        for record in records:
            ends = [interval(name, point, record.dense) for point in all_points(record)]
            _band(axes, curves[record.method][0], ends, lines[record.method])
            drawn += np.ravel(ends).tolist()
        faded = name == "fid" and any(map(fid_is_empty, records))
        _draw_methods(axes, curves, {k: _faded(line) for k, line in lines.items()} if faded else lines, labels)
        if faded:
            _say_faded(axes, records[0])
        drawn += _limits(axes, records[0], name)
        _rate_axis(axes, [rate for rates, _ in curves.values() for rate in rates])
        _metric_axis(axes, name, drawn)
        axes.set_xlabel("pruning rate", labelpad=-9)
    if QUALITY in metrics:
        axes = panels[-1]
        curves = {record.method: ([saved_share(p, record.dense) for p in all_points(record)],
                                  values_of(record, QUALITY)) for record in records}
        _draw_methods(axes, curves, lines, labels)
        _metric_axis(axes, QUALITY, np.concatenate([values for _, values in curves.values()]))
        axes.set_title(f"{QUALITY}  ↑ over what is saved")
        axes.set_xlabel("share of parameters removed or zeroed")
        axes.set_xlim(left=-0.02)
    figure.suptitle(f"Pruning methods on {records[0].model}" + ("\nWARNING: measured differently" if warning else ""),
                    color="#BB0000" if warning else "black")
    _caption(figure, records[0], metrics, f"{units(records)} Bands: 95 % intervals; of clip_score and lpips for the "
             "paired difference to dense. Dashed: real images, or another noise seed. A gap: not finite.",
             f"WARNING: {warning}" if warning else "")
    _label_ends(figure, *labels)
    return _save(figure, path)


@rc_context(STYLE)
def draw_models(records: Sequence[Record], path: Path) -> Path:
    """What each method does to several models: a column a method, a line a model; quality relative to dense.

    The records are of one data set and measured alike but for the model and its own settings.
    """
    records = in_order(records)
    models = list(dict.fromkeys(record.model for record in sorted(records, key=lambda record: record.model)))
    methods = list(dict.fromkeys(record.method for record in records))
    lines = {model: LINES[i % len(LINES)] for i, model in enumerate(models)}
    shown = [name for name in (QUALITY, "lpips_dense") if all(name in record.dense.metrics for record in records)]
    figure = Figure(figsize=(2.9 * len(methods) + 1, 2.9 * max(len(shown), 1) + 1.2), layout="constrained")
    lowest = min([0.0, *(value for record in records for name in shown for value in relative_curve(record, name)
                         if math.isfinite(value))])
    for row, name in enumerate(shown):
        for column, method in enumerate(methods):
            axes = figure.add_subplot(len(shown), len(methods), row * len(methods) + column + 1)
            measured = [record for record in records if record.method == method]
            for record in measured:
                _band(axes, [point.rate for point in all_points(record)],
                      [relative_interval(name, point, record.dense) for point in all_points(record)],
                      lines[record.model])
                _plot(axes, [point.rate for point in all_points(record)], relative_curve(record, name),
                      lines[record.model])
            axes.axhline(1, color="0.4", linestyle=":", linewidth=1.2, zorder=1)
            _rate_axis(axes, [point.rate for record in measured for point in record.points])
            axes.set_xticks(axes.get_xticks()[::2], [label.get_text() for label in axes.get_xticklabels()][::2])
            axes.set_ylim(lowest - 0.05, 1.1)
            axes.set_title(method if row == 0 else "")
            axes.set_ylabel(f"{formula(name)}  ↑" if column == 0 else "")
    for model in models:
        figure.axes[0].plot([], [], color=lines[model].colour, marker=lines[model].marker, label=model)
    figure.axes[0].legend(loc="lower left", fontsize=9, frameon=False)
    figure.suptitle("What pruning does to each model, by pruning rate (↑ is better, dense = 1)")
    first = records[0]
    settings = "; ".join(f"{record.model}: {protocol(record)}" for record in
                         {record.model: record for record in records}.values())
    _small_print(figure, [f"{first.dataset}, {counted(images_of(first), 'image')} a rate; {settings}. "
                          "Bands: 95 % intervals (clip_score: of the paired difference to dense). A gap: not finite."])
    return _save(figure, path)


def _draw_methods(axes, curves, lines, labels) -> None:
    """A line a method; its name is left in `labels`, for when all panels have their limits."""
    for method, (x, y) in curves.items():
        _plot(axes, x, y, lines[method])
    labels.append((axes, [(*_end(x, y), method, lines[method]) for method, (x, y) in curves.items()]))


@rc_context(STYLE)
def draw_synthetic(rates: Sequence[float], curves: Dict[str, Dict[str, Sequence[float]]], path: Path) -> Path:
    """The expected relation of rate and accuracy, marked all over as no measurement.

    curves: method -> {"expected": smooth values, "accuracy": the same with noise}, one a rate.
    """
    lines = _lines(list(curves), METHODS)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for method, curve in curves.items():
        axes.plot(rates, curve["expected"], color=lines[method].colour, linewidth=0.8, alpha=0.6)
        _plot(axes, rates, curve["accuracy"], lines[method]._replace(dashes=":"))
    _rate_axis(axes, rates)
    axes.set_xlabel("pruning rate", labelpad=-9)
    axes.set_ylabel("EXPECTED accuracy relative to the dense model\n(↑ is better, dense = 1)")
    for height in (0.2, 0.5, 0.8):
        axes.text(0.5, height, "SYNTHETIC - not a measurement", transform=axes.transAxes, rotation=14, fontsize=25,
                  color="0.4", alpha=0.35, ha="center", va="center", fontweight="bold", zorder=10)
    figure.suptitle("SYNTHETIC: what one might expect of each method, no model was run")
    _label_ends(figure, (axes, [(*_end(rates, curve["accuracy"]), method, lines[method])
                                for method, curve in curves.items()]))
    return _save(figure, path)


# ---- what the commands use

def draw_all(record: Record, folder, images_folder, tolerance: float = TOLERANCE) -> List[Path]:
    """Write the figures and the summary of a record into a folder; the paths written, each whole or not at all.

    images_folder: see draw_images, which is the one that can fail and so comes first.
    """
    folder = Path(folder)
    text = summary(record, tolerance)
    written = [
        draw_images(record, images_folder, folder / f"{record.method}_images.png"),
        draw_accuracy(record, folder / f"{record.method}.png", tolerance),
        draw_metrics(record, folder / f"{record.method}_metrics.png"),
        draw_cost(record, folder / f"{record.method}_cost.png"),
        _write_text(text, folder / f"{record.method}.txt"),
    ]
    return [path for path in written if path]


def compare_all(records: Sequence[Record], folder, tolerance: float = TOLERANCE, warning: str = "") -> List[Path]:
    """Write comparison.png and comparison.txt of records that share a protocol, or with a warning that they do not."""
    text = comparison_summary(records, tolerance, warning)
    return [draw_comparison(records, Path(folder) / "comparison.png", warning),
            _write_text(text, Path(folder) / "comparison.txt")]


def compare_models(records: Sequence[Record], folder) -> List[Path]:
    """Write the figure of the models of one data set."""
    return [draw_models(records, Path(folder) / f"models_{records[0].dataset}.png")]


def _write_text(text: str, path: Path) -> Path:
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")
    return path
