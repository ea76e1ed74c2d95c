"""The figures of one record, and the synthetic one. No torch, so that drawing starts at once."""
from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Dict, List, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from pruning import UserError
from pruning.methods import METHODS
from pruning.metrics import METRICS
from pruning.records.drawing import (
    STYLE,
    Line,
    band,
    band_note,
    caption,
    draw_noise_levels,
    draw_ratios,
    end_of,
    faded,
    faded_note,
    label_ends,
    level,
    lines_of,
    metric_axis,
    noise_levels,
    noise_note,
    panels,
    plot,
    rate_axis,
    ratio_axis,
    ratio_note,
    save,
    small_print,
    variant_lines,
)
from pruning.records.findings import (
    COSTS,
    QUALITY,
    TIMES,
    TOLERANCE,
    Cost,
    all_points,
    drawn_metrics,
    formula,
    images_of,
    interval,
    losses,
    metrics_of,
    named,
    relative_curve,
    relative_interval,
    relative_metrics,
    removes,
    unreliable,
    values_of,
    worst_images,
)
from pruning.records.record import Record
from pruning.records.store import image_file
from pruning.records.summaries import compile_note, protocol
from pruning.records.words import counted, rate_label

ROWS, WORST, CELL = 6, 2, 160  # of the figure of images: first captions, worst images, and pixels of an image


@rc_context(STYLE)
def draw_accuracy(record: Record, path: Path, tolerance: float = TOLERANCE) -> Path:
    """Draw the main figure: every quality metric relative to dense over the rate, higher is better."""
    points, metrics = all_points(record), relative_metrics(record)
    rates = [point.rate for point in points]
    lines = lines_of(metrics, METRICS)
    lines.update({name: faded(lines[name]) for name in metrics if unreliable(record, name)})
    curves = {name: relative_curve(record, name) for name in metrics}
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    axes = figure.add_subplot()
    for name in metrics:
        band(axes, rates, [relative_interval(name, point, record.dense) for point in points], lines[name])
        plot(axes, rates, curves[name], lines[name])
    level(axes, 1)
    if QUALITY in metrics:
        axes.axhline(1 - tolerance, color=lines[QUALITY].colour, linestyle=(0, (1, 3)), linewidth=1, zorder=1)
    finite = [value for curve in curves.values() for value in curve if math.isfinite(value)]
    axes.set_ylim(min([0.0, *finite]) - 0.03, max([1.1, *(1.05 * value for value in finite)]))
    rate_axis(axes, rates)
    axes.set_xlabel(f"pruning rate (share of {record.dense.unit} asked for)", labelpad=-9)
    axes.set_ylabel("accuracy relative to the dense model\n(↑ is better, dense = 1, dotted)")
    figure.suptitle(named(record))
    limit = f" Second dotted line: {100 * tolerance:g} % less {QUALITY} than dense." if QUALITY in metrics else ""
    apart = [name for name in metrics_of(record) if not (METRICS[name].relative or METRICS[name].cost)]
    undrawn = [name for name in metrics if not np.isfinite(curves[name]).any()]
    caption(
        figure, record, metrics,
        f"Each line is normalised as its name says. {band_note(metrics)}{limit} A gap: not finite.",
        f"Drawn in panels only, because a share of dense says nothing: {', '.join(apart)}." if apart else "",
        f"Not drawn, because dense has no value above 0: {', '.join(undrawn)}." if undrawn else "")
    label_ends(figure, (axes, [(*end_of(rates, curves[name]), formula(name), lines[name]) for name in metrics]))
    return save(figure, path)


@rc_context(STYLE)
def draw_metrics(record: Record, path: Path) -> Path:
    """Draw a panel for each metric in its own unit, with an arrow for the better direction. Dense is dotted."""
    points, metrics = all_points(record), drawn_metrics(record)
    rates = [point.rate for point in points]
    own = variant_lines([record])[record.variant]
    figure, all_axes = panels(len(metrics))
    for axes, name in zip(all_axes, metrics):
        line = faded(own) if unreliable(record, name) else own
        values, ends = values_of(record, name), [interval(name, point, record.dense) for point in points]
        plot(axes, rates, values, line)
        band(axes, rates, ends, line)
        if math.isfinite(values[0]):
            level(axes, values[0])
        rate_axis(axes, rates)
        metric_axis(axes, name, [*values, *np.ravel(ends), *sum(noise_levels(record, name).values(), [])])
        draw_noise_levels(axes, record, name)
        if unreliable(record, name):
            faded_note(axes, record, name)
    figure.suptitle(named(record))
    caption(figure, record, metrics, f"x: pruning rate, share of {record.dense.unit} asked for. Dotted: the dense "
            f"model. {band_note(metrics)} {noise_note([record], metrics)} A gap: not finite.")
    return save(figure, path)


@rc_context(STYLE)
def draw_cost(record: Record, path: Path) -> Path:
    """Draw a panel for each cost in its own unit, lower is better, with the dense model's cost dotted."""
    points = all_points(record)
    rates = [point.rate for point in points]
    line = variant_lines([record])[record.variant]
    figure, all_axes = panels(len(COSTS) + len(TIMES))
    for axes, (name, cost) in zip(all_axes, COSTS.items()):
        values = cost.scale * np.array([getattr(point, name) for point in points])
        level(axes, values[0])
        plot(axes, rates, values, line)
        if cost.other:
            _draw_other(axes, rates, values, [getattr(point, cost.other) for point in points], cost, line)
        axes.set_ylim(0, 1.15 * max(values) or 1)
        rate_axis(axes, rates)
        axes.set_title(f"{cost.title}  ↓ lower is better")
        axes.set_ylabel(cost.unit)
    for axes, name in zip(all_axes[len(COSTS):], TIMES):
        draw_ratios(axes, record, name, line)
        ratio_axis(axes, name)
        rate_axis(axes, rates)
        if not removes(record):
            axes.text(0.5, 0.05, "no speed-up on dense kernels", transform=axes.transAxes, ha="center", color="0.35")
    figure.suptitle(f"What {named(record)} saves")
    small_print(figure, [
        f"{record.model} on {record.settings['device']}, {protocol(record)}, "
        f"batches of {record.settings.get('batch_size', '?')}",
        f"x: pruning rate, share of {record.dense.unit} asked for. Dotted: the dense model. {ratio_note([record])} The "
        "dense image time is the pruned one's recomputed with the dense call time. Peak memory: the weights and the "
        "most that a call allocates.",
        compile_note(record)])
    return save(figure, path)


def _draw_other(axes, rates, values, others, cost: Cost, line: Line) -> None:
    """Draw the second line of a cost, if the record holds it and the first does not hide it."""
    if None in others:
        return
    others = cost.scale * np.array(others)
    if np.abs(others - values).max() > 0.01 * max(values):
        plot(axes, rates, others, line._replace(colour="0.55", marker="v", dashes="--"))
        axes.annotate(cost.label, (rates[-1], others[-1]), xytext=(-4, -6), textcoords="offset points", ha="right",
                      va="top", fontsize=9, color="0.35")


@rc_context(STYLE)
def draw_images(record: Record, images_folder, path: Path, tolerance: float = TOLERANCE) -> Path | None:
    """Draw images of captions down the page, rates across: the first captions, and those that lose most.

    images_folder: laid out as store.image_file says. Returns None if there is no image of the record in the folder.
    Raises UserError for an image that cannot be read.
    """
    rates = [point.rate for point in all_points(record)]
    files = {k: [image_file(images_folder, record.variant, rate, k) for rate in rates]
             for k in shown_images(record, tolerance)}
    rows = [k for k, row in files.items() if any(file.is_file() for file in row)]
    if not rows:
        return None
    point, worst = worst_images(record, WORST, tolerance)
    lost = {k: f"\n−{100 * losses(point, record.dense)[k]:.0f} % at rate {point.rate:g}" for k in worst}
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
    axes.set_xticklabels([rate_label(rate) for rate in rates])
    axes.set_yticks([(i + 0.5) * CELL for i in range(len(rows))])
    captions = [record.samples[k % len(record.samples)]["caption"] for k in rows]
    axes.set_yticklabels([textwrap.fill(textwrap.shorten(text, 100), 24) + lost.get(k, "")
                          for k, text in zip(rows, captions)], fontsize=8)
    figure.suptitle(f"{record.variant} pruning\nof {record.model}, by pruning rate")
    small_print(figure, [
        f"{record.dataset}, {len(rows)} of {counted(images_of(record), 'image')} at each rate, {protocol(record)}. "
        "All images of a row start from the same noise."
        + (f" With a percentage: those that lose most {QUALITY} at rate {point.rate:g}." if worst else "")])
    return save(figure, path)


def shown_images(record: Record, tolerance: float = TOLERANCE) -> List[int]:
    """Return the positions of the images that draw_images() shows: the first ROWS, and the WORST after them."""
    _, worst = worst_images(record, WORST, tolerance)
    first = range(min(ROWS, images_of(record)))
    return [*first, *(k for k in worst if k not in first)]


def _cell(file: Path) -> np.ndarray:
    """Return an image in a white frame, uint8 (CELL, CELL, 3); pale grey if there is no file."""
    cell = np.full((CELL, CELL, 3), 255, np.uint8)
    inner = CELL - 6
    if not file.is_file():
        cell[3:-3, 3:-3] = 235
        return cell
    try:
        with Image.open(file) as image:
            cell[3:-3, 3:-3] = np.asarray(image.convert("RGB").resize((inner, inner), Image.LANCZOS))
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{file} is not a readable image ({error}); remove it or measure again") from None
    return cell


@rc_context(STYLE)
def draw_synthetic(rates: Sequence[float], curves: Dict[str, Dict[str, Sequence[float]]], path: Path) -> Path:
    """Draw the expected relation of rate and accuracy, marked as synthetic in four places.

    curves: method -> {"expected": smooth values, "accuracy": values with noise}, one value a rate.
    """
    lines = lines_of(list(curves), METHODS)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for method, curve in curves.items():
        axes.plot(rates, curve["expected"], color=lines[method].colour, linewidth=0.8, alpha=0.6)
        plot(axes, rates, curve["accuracy"], lines[method]._replace(dashes=":"))
    rate_axis(axes, rates)
    axes.set_xlabel("pruning rate", labelpad=-9)
    axes.set_ylabel("EXPECTED accuracy relative to the dense model\n(↑ is better, dense = 1)")
    for height in (0.2, 0.5, 0.8):
        axes.text(0.5, height, "SYNTHETIC - not a measurement", transform=axes.transAxes, rotation=14, fontsize=25,
                  color="0.4", alpha=0.35, ha="center", va="center", fontweight="bold", zorder=10)
    figure.suptitle("SYNTHETIC: what one might expect of each method, no model was run")
    label_ends(figure, (axes, [(*end_of(rates, curve["accuracy"]), method, lines[method])
                               for method, curve in curves.items()]))
    return save(figure, path)
