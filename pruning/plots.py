"""Records -> figures and summary text. No torch, so that drawing starts at once.

Every figure is drawn from records alone, except the one that shows the images.
"""
from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from pruning import UserError, check_name
from pruning.methods import METHODS
from pruning.metrics import METRICS
from pruning.records import Point, Record, whole_file

ARROWS = {"higher": "↑", "lower": "↓"}
COST = "generation_time"  # what pruning should save; every other metric is about quality
GOOD, COLLAPSED = 0.95, 0.5  # shares of the dense model's clip_score
TIE = 0.01
ROWS, CELL = 6, 160  # of the figure of images: captions, and pixels an image

STYLE = {
    "font.size": 10, "axes.titlesize": 10, "figure.titlesize": 12, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "0.9", "axes.axisbelow": True,
    "lines.linewidth": 1.6, "lines.markersize": 5.5, "text.parse_math": False,  # a caption may hold a $
}


class Cost(NamedTuple):
    """How a figure of what a denoiser costs is shown: a field of Point, and the one with dense's value beside it."""

    title: str
    unit: str
    scale: float
    dense: str  # of the same point for a time, as both were taken in turn; else of the dense point


COSTS = {
    "parameters": Cost("parameters", "million", 1e-6, ""),
    "weight_bytes": Cost("weights on disk", "MB", 1e-6, ""),
    "peak_bytes": Cost("peak memory, one image", "MB", 1e-6, ""),
    "macs": Cost("multiply-accumulates a call", "billion, one latent", 1e-9, ""),
    "denoiser_seconds": Cost("time of a denoiser call", "ms, a batch", 1e3, "dense_denoiser_seconds"),
    "image_seconds": Cost("time of an image", "s", 1, "dense_image_seconds"),
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


# ---- numbers a figure or a summary needs

def rate_folder(rate: float) -> str:
    """The folder of a rate's images, 'dense' for 0."""
    return f"{rate:.4g}" if rate else "dense"


def relative(metric: str, value: float | None, dense: float | None) -> float:
    """A value relative to the dense model's, up is better and dense is 1; NaN where that says nothing."""
    if value is None or dense is None:
        return math.nan
    if metric == "lpips_dense":  # the distance to the dense model, which has 0
        return 1 - value
    if METRICS[metric].better == "higher":
        return value / dense if dense > 0 else math.nan
    return dense / value if dense > 0 and value > 0 else math.nan


def _relative_curve(record: Record, metric: str) -> List[float]:
    """A metric relative to the dense model at dense and at each rate."""
    return [relative(metric, point.metrics[metric], record.dense.metrics[metric]) for point in _all_points(record)]


def _formula(metric: str) -> str:
    if metric == "lpips_dense":
        return "1 − lpips_dense"
    return f"{metric} ÷ dense" if METRICS[metric].better == "higher" else f"dense ÷ {metric}"


def _metrics(record: Record) -> List[str]:
    for name in record.dense.metrics:
        check_name("metric", name, METRICS)
    return [name for name in METRICS if name in record.dense.metrics]


def _all_points(record: Record) -> List[Point]:
    return [record.dense, *record.points]


def _values(record: Record, metric: str) -> np.ndarray:
    """A metric at the dense model and at each rate; NaN where it was not finite."""
    return np.array([math.nan if p.metrics[metric] is None else p.metrics[metric] for p in _all_points(record)])


def _standard_errors(record: Record, metric: str) -> np.ndarray:
    """Of the mean over the images, a point each; NaN where there are no values per image."""
    return np.array([_standard_error(p.per_image.get(metric, [])) for p in _all_points(record)])


def _standard_error(values) -> float:
    finite = [value for value in values if value is not None]
    return np.std(finite, ddof=1) / math.sqrt(len(finite)) if len(finite) > 1 else math.nan


def saved_share(point: Point, dense: Point) -> float:
    """The share of the dense model's parameters that a point has removed or zeroed."""
    return 1 - point.nonzero_parameters / dense.nonzero_parameters if dense.nonzero_parameters else 0.0


def removes(record: Record) -> bool:
    """Whether the denoiser really shrank at any rate."""
    return any(point.parameters < record.dense.parameters for point in record.points)


def last_good(record: Record) -> Point | None:
    """The highest rate such that it, and every lower one measured, keeps 95 % of the dense clip_score."""
    good = None
    for point in record.points:
        if not relative("clip_score", *_clip_scores(point, record.dense)) >= GOOD:
            break
        good = point
    return good


def _clip_scores(*points: Point) -> List[float | None]:
    return [point.metrics.get("clip_score") for point in points]


# ---- figures

def _caption(figure: Figure, record: Record, metrics: Sequence[str], *notes: str) -> None:
    """Say in small print below a figure where its numbers come from."""
    used = "; ".join(f"{name}: {record.backbones[name]}" for name in metrics if name in record.backbones)
    images = _counted(len(record.samples), "image")
    lines = [f"{record.model} on {record.dataset}, {images} a rate, {_protocol(record)}",
             f"networks: {used}" if used else "",
             _fid_note(record) if "fid" in metrics else "", *notes]
    _small_print(figure, lines)


def _small_print(figure: Figure, lines: Sequence[str]) -> None:
    width = int(16 * figure.get_figwidth())  # letters of this size to an inch
    figure.supxlabel("\n".join(textwrap.fill(line, width, break_on_hyphens=False) for line in lines if line),
                     fontsize=8, color="0.3", x=0.02, ha="left")


def _protocol(record: Record) -> str:
    settings = record.settings
    return f"seed {settings['seed']}, {settings['steps']} steps, guidance {settings['guidance_scale']:g}"


def _fid_note(record: Record) -> str:
    reference = record.notes.get("fid_reference_images", "the")
    size = record.notes.get("fid_feature_size")
    return (f"FID is biased upwards at small N, here {_counted(len(record.samples), 'image')} against {reference} "
            f"reference images{f' in {size} features' if size else ''}: compare at equal N and reference only.")


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


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


def _label_ends(figure: Figure, axes, ends) -> None:
    """Name lines where they end, right of the axes, pushed apart so that no two names touch.

    ends: (x, y, name, Line) each.
    """
    ends = [end for end in ends if math.isfinite(end[1])]
    if not ends:
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", color="0.4")
        return
    figure.draw_without_rendering()  # the layout first: the gap between names depends on the height of the axes
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
def draw_accuracy(record: Record, path: Path) -> Path:
    """The main graph: every quality metric relative to the dense model over the rate, up is better."""
    rates = [point.rate for point in _all_points(record)]
    metrics = [name for name in _metrics(record) if name != COST]
    lines = _lines(metrics, METRICS)
    curves = {name: _relative_curve(record, name) for name in metrics}
    undrawn = [name for name in metrics if not np.isfinite(curves[name]).any()]
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.add_subplot()
    for name in metrics:
        _plot(axes, rates, curves[name], lines[name])
    axes.axhline(1, color="0.4", linestyle=":", linewidth=1.2, zorder=1)
    finite = [value for curve in curves.values() for value in curve if math.isfinite(value)]
    axes.set_ylim(min([0.0, *finite]) - 0.03, max([1.1, *(1.05 * value for value in finite)]))
    _rate_axis(axes, rates)
    axes.set_xlabel(f"pruning rate (share of {record.dense.unit} asked for)", labelpad=-9)
    axes.set_ylabel("accuracy relative to the dense model\n(↑ is better, dense = 1, dotted)")
    figure.suptitle(f"{record.method} pruning of {record.model}")
    _caption(
        figure, record, metrics,
        "Each line is normalised as its name says: higher-is-better ÷ dense, dense ÷ lower-is-better."
        + (" lpips_dense is the distance to the dense model's images, so 1 − it; not clipped."
           if "lpips_dense" in metrics else "") + " A gap: not finite.",
        f"Not drawn, for want of a dense value above 0: {', '.join(undrawn)}." if undrawn else "")
    _label_ends(figure, axes, [(*_end(rates, curves[name]), _formula(name), lines[name]) for name in metrics])
    return _save(figure, path)


@rc_context(STYLE)
def draw_metrics(record: Record, path: Path) -> Path:
    """A panel a metric in its own unit, with an arrow for the better direction; dense is dotted."""
    rates = [point.rate for point in _all_points(record)]
    metrics = _metrics(record)
    line = _lines([record.method], METHODS)[record.method]
    figure, panels = _panels(len(metrics))
    for axes, name in zip(panels, metrics):
        values, errors = _values(record, name), _standard_errors(record, name)
        _plot(axes, rates, values, line)
        axes.fill_between(rates, values - errors, values + errors, color=line.colour, alpha=0.2, linewidth=0)
        if math.isfinite(values[0]):
            axes.axhline(values[0], color="0.4", linestyle=":", linewidth=1.2, zorder=1)
        _rate_axis(axes, rates)
        _metric_axis(axes, name, values)
    figure.suptitle(f"{record.method} pruning of {record.model}")
    _caption(figure, record, metrics, f"x: pruning rate, share of {record.dense.unit} asked for. Dotted: the dense "
             "model. Band: ± one standard error of the mean over images, where each has a value. A gap: not finite.")
    return _save(figure, path)


def _panels(count: int, width: float = 4.8):
    columns = min(2, count) or 1
    rows = math.ceil(count / columns) or 1
    figure = Figure(figsize=(width * columns, 2.9 * rows + 1), layout="constrained")
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
    points = _all_points(record)
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
        f"{record.model} on {record.settings['device']}, {_protocol(record)}, "
        f"batches of {record.settings.get('batch_size', '?')}",
        f"x: pruning rate, share of {record.dense.unit} asked for. Dotted: the dense model; its times were taken in "
        "turn with the pruned one's at each rate (denoiser call: median; image: mean). Peak memory: weights and the "
        "most that a call holds besides."])
    return _save(figure, path)


def dense_cost(name: str, point: Point, dense: Point) -> float:
    """What the dense model costs where `point` costs getattr(point, name)."""
    return getattr(point, COSTS[name].dense) if COSTS[name].dense else getattr(dense, name)


@rc_context(STYLE)
def draw_images(record: Record, images_folder, path: Path) -> Path | None:
    """The same captions down the page and rates across; None where the folder has no image of the record.

    images_folder: holds the images of a rate as <method>/<rate or 'dense'>/<position in samples>.png.
    """
    rates = [point.rate for point in _all_points(record)]
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
        f"{record.dataset}, {len(rows)} of {_counted(len(record.samples), 'image')} a rate, {_protocol(record)}. "
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
def draw_comparison(records: Sequence[Record], path: Path) -> Path:
    """All methods in one panel a metric, and the CLIP score over what each really removed or zeroed.

    The records must share a protocol (records.protocol_differences).
    """
    records = _in_order(records)
    lines = _lines([record.method for record in records], METHODS)
    metrics = _metrics(records[0])
    figure, panels = _panels(len(metrics) + ("clip_score" in metrics), width=5.4)
    labels = []
    for axes, name in zip(panels, metrics):
        curves = {record.method: ([p.rate for p in _all_points(record)], _values(record, name)) for record in records}
        _draw_methods(axes, curves, lines, labels)
        _rate_axis(axes, [rate for rates, _ in curves.values() for rate in rates])
        _metric_axis(axes, name, np.concatenate([values for _, values in curves.values()]))
        axes.set_xlabel("pruning rate", labelpad=-9)
    if "clip_score" in metrics:
        axes = panels[-1]
        curves = {record.method: ([saved_share(p, record.dense) for p in _all_points(record)],
                                  _values(record, "clip_score")) for record in records}
        _draw_methods(axes, curves, lines, labels)
        _metric_axis(axes, "clip_score", np.concatenate([values for _, values in curves.values()]))
        axes.set_title("clip_score  ↑ over what is saved")
        axes.set_xlabel("share of parameters removed or zeroed")
        axes.set_xlim(left=-0.02)
    figure.suptitle(f"Pruning methods on {records[0].model}")
    _caption(figure, records[0], metrics, f"{_units(records)} A gap: not finite.")
    for axes, ends in labels:
        _label_ends(figure, axes, ends)
    return _save(figure, path)


@rc_context(STYLE)
def draw_models(records: Sequence[Record], path: Path) -> Path:
    """What each method does to several models: a column a method, a line a model; quality relative to dense.

    The records are of one data set and measured alike but for the model and its own settings.
    """
    records = _in_order(records)
    models = list(dict.fromkeys(record.model for record in sorted(records, key=lambda record: record.model)))
    methods = list(dict.fromkeys(record.method for record in records))
    lines = {model: LINES[i % len(LINES)] for i, model in enumerate(models)}
    shown = [name for name in ("clip_score", "lpips_dense") if all(name in record.dense.metrics for record in records)]
    figure = Figure(figsize=(2.9 * len(methods) + 1, 2.9 * max(len(shown), 1) + 1.2), layout="constrained")
    lowest = min([0.0, *(value for record in records for name in shown for value in _relative_curve(record, name)
                         if math.isfinite(value))])
    for row, name in enumerate(shown):
        for column, method in enumerate(methods):
            axes = figure.add_subplot(len(shown), len(methods), row * len(methods) + column + 1)
            measured = [record for record in records if record.method == method]
            for record in measured:
                rates = [point.rate for point in _all_points(record)]
                _plot(axes, rates, _relative_curve(record, name), lines[record.model])
            axes.axhline(1, color="0.4", linestyle=":", linewidth=1.2, zorder=1)
            _rate_axis(axes, [point.rate for record in measured for point in record.points])
            axes.set_xticks(axes.get_xticks()[::2], [label.get_text() for label in axes.get_xticklabels()][::2])
            axes.set_ylim(lowest - 0.05, 1.1)
            axes.set_title(method if row == 0 else "")
            axes.set_ylabel(f"{_formula(name)}  ↑" if column == 0 else "")
    for model in models:
        figure.axes[0].plot([], [], color=lines[model].colour, marker=lines[model].marker, label=model)
    figure.axes[0].legend(loc="lower left", fontsize=9, frameon=False)
    figure.suptitle("What pruning does to each model, by pruning rate (↑ is better, dense = 1)")
    first = records[0]
    settings = "; ".join(f"{record.model}: {_protocol(record)}" for record in
                         {record.model: record for record in records}.values())
    _small_print(figure, [f"{first.dataset}, {_counted(len(first.samples), 'image')} a rate; {settings}. "
                          "A gap: not finite."])
    return _save(figure, path)


def _draw_methods(axes, curves, lines, labels) -> None:
    """A line a method; its name is left in `labels`, for when all panels have their limits."""
    for method, (x, y) in curves.items():
        _plot(axes, x, y, lines[method])
    labels.append((axes, [(*_end(x, y), method, lines[method]) for method, (x, y) in curves.items()]))


def _units(records: Sequence[Record]) -> str:
    """What a rate means for each method, in words."""
    return ("A rate is a share of what the method prunes ("
            + "; ".join(f"{record.method}: {record.dense.unit}, {'removed' if removes(record) else 'zeroed'}"
                        for record in records) + "), so equal rates do not save equally.")


def _in_order(records: Sequence[Record]) -> List[Record]:
    order = list(METHODS)
    return sorted(records, key=lambda r: (order.index(r.method) if r.method in order else len(order), r.method))


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
    _label_ends(figure, axes, [(*_end(rates, curve["accuracy"]), method, lines[method])
                               for method, curve in curves.items()])
    return _save(figure, path)


# ---- text

def summary(record: Record) -> str:
    """A table and three sentences that a stranger can read."""
    metrics = _metrics(record)
    header = ["rate", "sparsity", "parameters", "nonzero", *(f"{n} {ARROWS[METRICS[n].better]}" for n in metrics)]
    units = ["", "", "", "", *(METRICS[name].unit for name in metrics)]
    rows = [[rate_folder(p.rate), f"{p.sparsity:.3f}", f"{p.parameters:,}", f"{p.nonzero_parameters:,}",
             *(_number(p.metrics[name]) for name in metrics)] for p in _all_points(record)]
    parts = [_header(record), _table([header, units, *rows]), _legend(record, metrics), _cost_table(record),
             "\n".join(_wrap(sentence) for sentence in _sentences(record)), _wrap(left_out(record))]
    if "fid" in metrics:
        parts.append(_wrap(_fid_note(record)))
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(record: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    help_text = f" ({METHODS[record.method].help})" if record.method in METHODS else ""
    return "\n".join([
        f"{record.method} pruning of {record.model}{help_text}",
        _wrap(f"{_counted(len(record.samples), 'image')} of {record.dataset} at every rate, {_protocol(record)}, "
              f"on {record.settings['device']}; {versions}"),
        f"A rate is the share of {record.dense.unit} asked for, sparsity the share reached."])


def _cost_table(record: Record) -> str:
    """What a denoiser costs at each rate, times as shares of dense's, which were taken in turn with them."""
    rows = [["rate", "parameters", "weights", "peak memory", "MACs", "call", "image"],
            ["", "million", "MB", "MB", "billion", "÷ dense", "÷ dense"]]
    for point in _all_points(record):
        row = [rate_folder(point.rate)]
        for name, cost in COSTS.items():
            value = getattr(point, name)
            row.append(f"{value / dense_cost(name, point, record.dense):.2f}" if cost.dense
                       else _number(cost.scale * value))
        rows.append(row)
    return "What it costs (MACs: one latent; peak memory: one image; call: of the denoiser, a batch)\n" + _table(rows)


def left_out(record: Record) -> str:
    """A sentence on the modules that the method did not know how to prune, "" if there are none."""
    modules = record.notes.get("left_out") or {}
    reasons: Dict[str, List[str]] = {}
    for name, why in modules.items():
        reasons.setdefault(why, []).append(name)
    parts = [f"{_counted(len(names), 'module')} ({names[0]}{', …' if len(names) > 1 else ''}), as {why}"
             for why, names in reasons.items()]
    return f"Left out: {'; '.join(parts)}." if parts else ""


def _legend(record: Record, metrics) -> str:
    lines = [f"{name} {ARROWS[METRICS[name].better]} {METRICS[name].better} is better: {METRICS[name].help}"
             + (f" [{record.backbones[name]}]" if name in record.backbones else "") for name in metrics]
    if any(point.metrics[name] is None for point in _all_points(record) for name in metrics):
        lines.append("–: not finite")
    return "\n".join(map(_wrap, lines))


def _sentences(record: Record) -> List[str]:
    if not record.points:
        return ["No rate has been measured yet."]
    return [*_quality(record), _gain(record)]


def _quality(record: Record) -> List[str]:
    dense = record.dense.metrics.get("clip_score")
    if dense is None or dense <= 0:
        reason = "was not measured" if "clip_score" not in record.dense.metrics else f"is {_number(dense)}"
        return [f"Quality: the dense model's clip_score {reason}, so nothing can be said relative to it."]
    good, last = last_good(record), record.points[-1]
    if good is None:
        first = record.points[0]
        quality = (f"Quality: no rate measured stays within 5 % of dense by clip_score; the lowest, "
                   f"{first.rate:g}, has {_share_of_dense(first, record.dense)}.")
    else:
        moved = good.metrics.get("lpips_dense")
        quality = (f"Quality: within 5 % of dense by clip_score up to rate {good.rate:g}, which has "
                   f"{_share_of_dense(good, record.dense)}"
                   + (f"; the images themselves have moved there by lpips_dense {_number(moved)}." if moved else "."))
    collapsed = next((point for point in record.points
                      if not relative("clip_score", *_clip_scores(point, record.dense)) >= COLLAPSED), None)
    if collapsed and collapsed.metrics["clip_score"] is None:
        collapse = f"Collapse: clip_score is not finite at rate {collapsed.rate:g}."
    elif collapsed:
        collapse = (f"Collapse: clip_score first falls below half of dense at rate {collapsed.rate:g}, "
                    f"to {_share_of_dense(collapsed, record.dense)}.")
    else:
        collapse = (f"Collapse: clip_score does not fall below half of dense up to rate {last.rate:g}, which has "
                    f"{_share_of_dense(last, record.dense)}; an unrelated image may score well above 0 too, so look "
                    "at the images.")
    return [quality, collapse]


def _share_of_dense(point: Point, dense: Point) -> str:
    """'97.1 ± 1.2 % of dense', with the standard error of the paired differences."""
    score, dense_score = _clip_scores(point, dense)
    if score is None:
        return "no finite clip_score"
    pairs = zip(point.per_image.get("clip_score", []), dense.per_image.get("clip_score", []))
    error = _standard_error([a - b for a, b in pairs if a is not None and b is not None])
    spread = f" ± {100 * error / dense_score:.1f}" if math.isfinite(error) else ""
    return f"{100 * score / dense_score:.1f}{spread} % of dense"


def _gain(record: Record) -> str:
    dense, last = record.dense, record.points[-1]
    good = last_good(record)
    points = [last] if good in (None, last) else [good, last]
    size = f"{dense.weight_bytes / 1e6:,.1f}"
    if removes(record):
        return "Gain: " + "; ".join(
            f"at rate {point.rate:g}, parameters fall from {dense.parameters:,} to {point.parameters:,} "
            f"({_change(point.parameters, dense.parameters)}), weights from {size} to "
            f"{point.weight_bytes / 1e6:,.1f} MB, multiply-accumulates by {_change(point.macs, dense.macs)}, "
            f"and {_time(point)}" for point in points) + "."
    zeroed = "; ".join(f"at rate {point.rate:g}, {100 * saved_share(point, dense):.1f} % of the parameters are zero "
                       f"and {_time(point)}" for point in points)
    return (f"Gain: none with dense kernels and files: {zeroed}. The file still holds all {dense.parameters:,} "
            f"parameters ({size} MB): zeros do not shrink it, nor do they make dense kernels faster.")


def _change(value: float, dense: float) -> str:
    return f"{100 * (value / dense - 1):+.1f} %".replace("-", "−") if dense else "no change"


def _time(point: Point) -> str:
    """Timed in turn with dense, so that a busy machine slows both; generation_time is of one run after another."""
    now, before = 1000 * point.denoiser_seconds, 1000 * point.dense_denoiser_seconds
    image = point.image_seconds / point.dense_image_seconds
    return (f"a denoiser call takes {now / before:.2f} times as long as dense ({_number(now)} and {_number(before)} "
            f"ms), an image {image:.2f} times")


def comparison_summary(records: Sequence[Record]) -> str:
    """Tables of rate by method, the best by clip_score at each rate, and how far each method goes."""
    records = _in_order(records)
    rates = sorted({point.rate for record in records for point in _all_points(record)})
    at = {(record.method, point.rate): (record, point) for record in records for point in _all_points(record)}
    methods = [record.method for record in records]

    def table(title, shown):
        rows = [[rate_folder(rate), *(shown(*at[method, rate]) if (method, rate) in at else "" for method in methods)]
                for rate in rates]
        return f"{title}\n" + _table([["rate", *methods], *rows])

    first = records[0]
    metrics = _metrics(first)
    parts = [f"Pruning methods on {first.model}\n" + _wrap(
        f"{_counted(len(first.samples), 'image')} of {first.dataset} at every rate, {_protocol(first)}, "
        f"on {first.settings['device']}")]
    for name in metrics:
        unit = f" [{METRICS[name].unit}]" if METRICS[name].unit else ""
        parts.append(table(f"{name}{unit} {ARROWS[METRICS[name].better]} {METRICS[name].better} is better",
                           lambda _, point, name=name: _number(point.metrics[name])))
    parts.append(table("share of the denoiser's parameters removed or zeroed",
                       lambda record, point: f"{saved_share(point, record.dense):.3f}"))
    if "clip_score" in metrics:
        winners = [[f"{rate:g}", _winner([at[method, rate] for method in methods if (method, rate) in at])]
                   for rate in rates if rate > 0]
        if winners:
            parts.append("best by clip_score at equal rate (a tie: within 1 %)\n" + "\n".join(
                f"  {rate:>5}  {winner}" for rate, winner in winners))
        parts.append("highest rate within 5 % of dense by clip_score\n" + "\n".join(
            f"  {record.method}: {_reach(record)}" for record in records))
    parts.append(_wrap(f"{_units(records)} Only removal shrinks the file and the time."))
    if any(None in point.metrics.values() for _, point in at.values()):
        parts.append("–: not finite")
    if "fid" in metrics:
        parts.append(_wrap(_fid_note(first)))
    return "\n\n".join(parts) + "\n"


def _winner(measured) -> str:
    """The method of the highest clip_score among (record, point), with those that tie."""
    scores = {record.method: (point.metrics["clip_score"], record.dense.metrics["clip_score"])
              for record, point in measured if point.metrics["clip_score"] is not None}
    if not scores:
        return "none is finite"
    best = max(score for score, _ in scores.values())
    if best <= 0:
        return "none is above 0"
    winners = [method for method, (score, _) in scores.items() if score >= (1 - TIE) * best]
    note = " (tie)" if len(winners) > 1 else " (the only one measured)" if len(measured) == 1 else ""
    if all(relative("clip_score", *pair) < COLLAPSED for pair in scores.values()):
        note += ", but all are below half of dense"
    return " and ".join(winners) + note


def _reach(record: Record) -> str:
    good = last_good(record)
    if not record.dense.metrics["clip_score"] or record.dense.metrics["clip_score"] <= 0:
        return "cannot be said, the dense clip_score is not above 0"
    if good is None:
        return "none measured"
    kind = "removed" if removes(record) else "zeroed"
    return f"{good.rate:g}, {100 * saved_share(good, record.dense):.1f} % of the parameters {kind}"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}".replace("-", "−")


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _wrap(text: str) -> str:
    return textwrap.fill(text, 110, subsequent_indent="  ", break_on_hyphens=False)


# ---- what the commands use

def draw_all(record: Record, folder, images_folder) -> List[Path]:
    """Write the figures and the summary of a record into a folder; the paths written, each whole or not at all.

    images_folder: see draw_images, which is the one that can fail and so comes first.
    """
    folder = Path(folder)
    text = summary(record)
    written = [
        draw_images(record, images_folder, folder / f"{record.method}_images.png"),
        draw_accuracy(record, folder / f"{record.method}.png"),
        draw_metrics(record, folder / f"{record.method}_metrics.png"),
        draw_cost(record, folder / f"{record.method}_cost.png"),
        _write_text(text, folder / f"{record.method}.txt"),
    ]
    return [path for path in written if path]


def compare_all(records: Sequence[Record], folder) -> List[Path]:
    """Write comparison.png and comparison.txt of records that share a protocol."""
    text = comparison_summary(records)
    return [draw_comparison(records, Path(folder) / "comparison.png"),
            _write_text(text, Path(folder) / "comparison.txt")]


def compare_models(records: Sequence[Record], folder) -> List[Path]:
    """Write the figure of the models of one data set."""
    return [draw_models(records, Path(folder) / f"models_{records[0].dataset}.png")]


def _write_text(text: str, path: Path) -> Path:
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")
    return path
