"""The graphs of one record, and the synthetic one. No torch, so that drawing starts at once."""
from __future__ import annotations

import math
from pathlib import Path
from typing import Dict, NamedTuple, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from pruning.metrics import METRICS
from pruning.records.answers import brief
from pruning.records.drawing import (
    STYLE,
    WIDTH,
    band_note,
    curve,
    draw_noise_levels,
    end_of,
    label_ends,
    left_out_note,
    level,
    marks,
    metric_axis,
    noise_levels,
    noise_note,
    panels,
    rate_axis,
    ratio_note,
    safe_zone,
    save,
    small_print,
    title,
    value_axis,
)
from pruning.records.findings import (
    QUALITY,
    TIMES,
    TOLERANCE,
    all_points,
    drawn_metrics,
    formula,
    interval,
    last_good,
    metrics_of,
    named,
    relative_curve,
    relative_interval,
    relative_metrics,
    removes,
    time_ratio,
    unreliable,
    values_of,
)
from pruning.records.palette import lines_of, variant_lines
from pruning.records.record import Point, Record
from pruning.records.summaries import compile_note, protocol, setup


@rc_context(STYLE)
def draw_accuracy(record: Record, path: Path, tolerance: float = TOLERANCE) -> Path:
    """Draw the main figure: every quality metric relative to dense over the rate, higher is better."""
    points = all_points(record)
    rates, known = [point.rate for point in points], relative_metrics(record)
    metrics = [name for name in known if not unreliable(record, name)]
    lines, curves = lines_of(metrics), {name: relative_curve(record, name) for name in metrics}
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for name in metrics:
        curve(axes, rates, curves[name], [relative_interval(name, point, record.dense) for point in points],
              lines[name])
    level(axes, 1)
    if QUALITY in metrics:
        axes.axhline(1 - tolerance, color=lines[QUALITY].colour, linestyle=(0, (1, 3)), linewidth=1.2, zorder=1)
    value_axis(axes, [1 - 2 * tolerance, 1.0, *(value for each in curves.values() for value in each)])
    rate_axis(axes, rates, 10)
    safe_zone(axes, record, tolerance, top=False)
    axes.set_xlabel(f"pruning rate (share of {record.dense.unit} asked for)")
    axes.set_ylabel("accuracy relative to the dense model\n(↑ is better, dense = 1)")
    title(figure, brief(record, tolerance)[len("How far? "):])
    apart = [name for name in metrics_of(record) if not (METRICS[name].relative or METRICS[name].cost)]
    undrawn = [name for name in metrics if not np.isfinite(curves[name]).any()]
    limit = f" Lower dotted line: {100 * tolerance:g} % less {QUALITY} than dense." if QUALITY in metrics else ""
    small_print(
        figure, f"{setup(record)}. Each line is normalised as its name says.{limit}", band_note(metrics),
        left_out_note([record], known),
        f"In their own figure, because a share of dense says nothing: {', '.join(apart)}." if apart else "",
        f"Not drawn, because dense has no value above 0: {', '.join(undrawn)}." if undrawn else "")
    label_ends(figure, (axes, [(*end_of(rates, curves[name]), formula(name), lines[name]) for name in metrics]))
    return save(figure, path)


@rc_context(STYLE)
def draw_metrics(record: Record, path: Path, tolerance: float = TOLERANCE) -> Path:
    """Draw a panel for each metric in its own unit, with an arrow for the better direction. Dense is dotted."""
    points, known = all_points(record), drawn_metrics(record)
    rates, metrics = [point.rate for point in points], [name for name in known if not unreliable(record, name)]
    line = variant_lines([record])[record.variant]
    figure, all_axes = panels(len(metrics))
    for axes, name in zip(all_axes, metrics):
        values, ends = values_of(record, name), [interval(name, point, record.dense) for point in points]
        curve(axes, rates, values, ends, line)
        if math.isfinite(values[0]):
            level(axes, values[0])
        value_axis(axes, [*values, *np.ravel(ends), *sum(noise_levels(record, name).values(), [])])
        rate_axis(axes, rates)
        safe_zone(axes, record, tolerance, top=METRICS[name].better == "lower")
        draw_noise_levels(axes, record, name)
        metric_axis(axes, name)
    title(figure, f"{named(record)}: each metric over the pruning rate, the share of "
                  f"{record.dense.unit} asked for")
    small_print(figure, f"{setup(record)}. Dotted: the dense model. {noise_note([record], metrics)}",
                band_note(metrics), left_out_note([record], known))
    return save(figure, path)


class Size(NamedTuple):
    """A field of Point that is a size, and how it is shown."""

    field: str
    scale: float  # from the field's unit to the unit shown
    unit: str


SIZES = {
    "parameters": Size("parameters", 1e-6, "million"),
    "nonzero parameters": Size("nonzero_parameters", 1e-6, "million"),
    "weights in memory": Size("weight_bytes", 1e-6, "MB"),
    "saved file": Size("file_bytes", 1e-6, "MB"),
    "peak memory, one image": Size("peak_bytes", 1e-6, "MB"),
    "multiply-accumulates": Size("macs", 1e-9, "billion"),
}


class Bar(NamedTuple):
    """What a point costs as a share of dense, its 95 % interval, and the cost in its own unit."""

    share: float
    ends: Sequence[float]
    text: str


def bars(point: Point, dense: Point) -> Dict[str, Bar]:
    """Return a bar for each cost that a record holds and that says something, by its name."""
    found = {}
    for name, size in SIZES.items():
        own, before = getattr(point, size.field), getattr(dense, size.field)
        if own is not None and before:
            text = f"{size.scale * own:,.3g} of {size.scale * before:,.3g} {size.unit}"
            found[name] = Bar(own / before, (math.nan, math.nan), text)
    if point.nonzero_parameters > 0.995 * point.parameters:
        found.pop("nonzero parameters", None)
    for name, time in TIMES.items():
        share, *ends = time_ratio(name, point, dense)
        if math.isfinite(share):
            found[time.title] = Bar(share, ends, "" if math.isnan(ends[0]) else f"{ends[0]:.2f} to {ends[1]:.2f}")
    return found


@rc_context(STYLE)
def draw_cost(record: Record, path: Path, tolerance: float = TOLERANCE) -> Path | None:
    """Draw what the denoiser costs at the safe rate and at half of it, as shares of dense with 95 % intervals of times.

    Half is the measured rate nearest to it. Without a safe rate, the lowest is drawn. Returns None if there is no rate.
    """
    if not record.points:
        return None
    good = last_good(record, tolerance)
    first = good or record.points[0]
    half = min(record.points, key=lambda point: abs(point.rate - first.rate / 2)) if good else first
    drawn = [first] if half is first else [first, half]
    line = variant_lines([record])[record.variant]
    sets = [bars(point, record.dense) for point in drawn]
    names = [name for name in sets[0] if all(name in each for each in sets)]
    figure = Figure(figsize=(WIDTH, 0.23 * len(names) * len(drawn) + 0.16 * len(names) + 1.5), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(drawn)
    for place, (point, each) in enumerate(zip(drawn, sets)):
        heights = np.arange(len(names)) + (place - (len(drawn) - 1) / 2) * width
        which = f"rate {point.rate:g}, safe" if point is good else f"rate {point.rate:g}"
        axes.barh(heights, [each[name].share for name in names], 0.9 * width, color=line.colour,
                  alpha=(1, 0.45)[place], label=which)
        for y, bar in zip(heights, (each[name] for name in names)):
            axes.hlines(y, *bar.ends, color="black", linewidth=1.2)
            axes.annotate(f"{bar.share:.2f}" + (f"  ({bar.text})" if bar.text else ""),
                          (max(bar.share, 0 if math.isnan(bar.ends[1]) else bar.ends[1]), y), xytext=(4, 0),
                          textcoords="offset points", va="center", fontsize=8,
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # over the line of dense
    axes.axvline(1, color="0.4", linestyle=":", linewidth=1.2)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlim(0, max([1.05, *(each[name].share + 0.4 for each in sets for name in names)]))
    axes.set_xlabel("÷ dense (← lower is better)")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=8)
    title(figure, f"What {named(record)} costs at "
                  + (f"its safe rate {first.rate:g}" if good else f"rate {first.rate:g}; no measured rate is safe")
                  + (f", and at {half.rate:g}" if half is not first else ""))
    batches = f"batches of {record.settings.get('batch_size', '?')}"
    near = f" {half.rate:g} is the measured rate nearest to half of {first.rate:g}." if half is not first else ""
    small_print(
        figure, f"{record.settings['device']}, {protocol(record)}, {batches}.{near}",
        f"{ratio_note([record])} Black: 95 % intervals. Peak memory: the weights and the most that a call allocates.",
        "" if removes(record) else "Zeros make no dense kernel faster.", compile_note(record))
    return save(figure, path)


@rc_context(STYLE)
def draw_synthetic(rates: Sequence[float], curves: Dict[str, Dict[str, Sequence[float]]], path: Path) -> Path:
    """Draw the expected relation of rate and accuracy, marked as synthetic in four places.

    curves: method -> {"expected": smooth values, "accuracy": values with noise}, one value a rate.
    """
    lines = lines_of(list(curves))
    figure = Figure(figsize=(WIDTH, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for method, each in curves.items():
        axes.plot(rates, each["expected"], color=lines[method].colour, linestyle=":")
        axes.plot(rates, each["accuracy"], linestyle="", clip_on=False, **marks(lines[method]))
    rate_axis(axes, rates, 10)
    axes.set_xlabel("pruning rate")
    axes.set_ylabel("EXPECTED accuracy relative to the dense model\n(↑ is better, dense = 1)")
    for height in (0.2, 0.5, 0.8):
        axes.text(0.5, height, "SYNTHETIC - not a measurement", transform=axes.transAxes, rotation=14, fontsize=25,
                  color="0.4", alpha=0.35, ha="center", va="center", fontweight="bold", zorder=10)
    title(figure, "SYNTHETIC: what one might expect of each method, no model was run")
    small_print(figure, "Lines: the expectation. Marks: the expectation with noise.")
    label_ends(figure, (axes, [(*end_of(rates, each["accuracy"]), method, lines[method])
                               for method, each in curves.items()]))
    return save(figure, path)
