"""The figures of several records: the variants of a model, and several models. No torch."""
from __future__ import annotations

import math
from pathlib import Path
from typing import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from pruning.records.drawing import (
    STYLE,
    band,
    band_note,
    caption,
    draw_noise_levels,
    draw_ratios,
    end_of,
    faded,
    faded_note,
    label_ends,
    legend_entry,
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
    ratios,
    save,
    small_print,
    variant_lines,
)
from pruning.records.findings import (
    QUALITY,
    SAVED,
    SIMILARITY,
    all_points,
    drawn_metrics,
    formula,
    images_of,
    in_order,
    interval,
    metrics_of,
    relative_curve,
    relative_interval,
    unreliable,
    values_of,
)
from pruning.records.record import Record
from pruning.records.summaries import compile_note, protocol, units
from pruning.records.words import counted

LONGEST_LABEL = 18  # letters of a name beside a panel
FRONTIER = (0.6, 1.03)  # of the dense QUALITY: what the first panels show, as nobody wants less


@rc_context(STYLE)
def draw_comparison(records: Sequence[Record], path: Path, warning: str = "") -> Path:
    """Draw QUALITY over what is saved, as the first panels, and all variants in one panel for each metric.

    warning: how the records were measured differently, if they were.
    """
    records = in_order(records)
    lines, metrics = variant_lines(records), drawn_metrics(*records)
    direct = max(map(len, lines)) <= LONGEST_LABEL  # whether names stand at the ends of lines, or in a legend
    frontiers = SAVED if QUALITY in metrics else {}
    figure, all_axes = panels(len(metrics) + len(frontiers) + 1, width=5)
    labelled = []
    for axes, (what, share) in zip(all_axes, frontiers.items()):
        curves = {record.variant: ([share(point, record.dense) for point in all_points(record)],
                                   relative_curve(record, QUALITY)) for record in records}
        labelled.append((axes, _plot_all(axes, curves, lines)))
        axes.set_title(f"{QUALITY} ÷ dense  ↑ over what is saved")
        axes.set_xlabel(f"share of {what}")
        axes.set_xlim(-0.02, max(0.3, *(x for xs, _ in curves.values() for x in xs)) + 0.02)
        axes.set_ylim(*FRONTIER)
        for line in axes.lines:
            line.set_clip_on(True)  # what is lower leaves the panel
        level(axes, 1)
    for axes, name in zip(all_axes[len(frontiers):], metrics):
        pale = any(unreliable(record, name) for record in records)
        styles = {variant: faded(line) for variant, line in lines.items()} if pale else lines
        curves = {record.variant: (_rates(record), values_of(record, name)) for record in records}
        drawn = sum(noise_levels(records[0], name).values(), [])
        for record in records:
            ends = [interval(name, point, record.dense) for point in all_points(record)]
            band(axes, _rates(record), ends, styles[record.variant])
            drawn += [*curves[record.variant][1], *np.ravel(ends)]
        labelled.append((axes, _plot_all(axes, curves, styles)))
        if pale:
            faded_note(axes, records[0], name)
        rate_axis(axes, [rate for record in records for rate in _rates(record)])
        metric_axis(axes, name, drawn)
        draw_noise_levels(axes, records[0], name)
        axes.set_xlabel("pruning rate", labelpad=-9)
    last = all_axes[-1]
    for record in records:
        draw_ratios(last, record, "image_seconds", lines[record.variant])
    labelled.append((last, [(*end_of(_rates(record), ratios(record, "image_seconds")[0]), record.variant,
                             lines[record.variant]) for record in records]))
    ratio_axis(last, "image_seconds")
    rate_axis(last, [rate for record in records for rate in _rates(record)])
    last.set_xlabel("pruning rate", labelpad=-9)
    figure.suptitle(f"Pruning methods on {records[0].model}" + ("\nWARNING: measured differently" if warning else ""),
                    color="#BB0000" if warning else "black")
    caption(figure, records[0], metrics, units(records),
            f"{band_note(metrics)} {noise_note(records[:1], metrics)} A gap: not finite. {ratio_note(records)}",
            *map(compile_note, records), f"WARNING: {warning}" if warning else "")
    if direct:
        label_ends(figure, *labelled)
    else:
        figure.legend(handles=[legend_entry(variant, lines[variant]) for variant in _variants(records)],
                      loc="outside right upper", frameon=False)
    return save(figure, path)


def _variants(records: Sequence[Record]) -> list:
    return list(dict.fromkeys(record.variant for record in records))


def _rates(record: Record) -> list:
    return [point.rate for point in all_points(record)]


def _plot_all(axes, curves, lines) -> list:
    """Draw a line for each variant and return their ends, to be labelled when all axes have their limits."""
    for variant, (x, y) in curves.items():
        plot(axes, x, y, lines[variant])
    return [(*end_of(x, y), variant, lines[variant]) for variant, (x, y) in curves.items()]


@rc_context(STYLE)
def draw_models(records: Sequence[Record], path: Path) -> Path | None:
    """Draw several models: a column a variant, a line a model, and quality relative to dense.

    The records are of one data set and were measured alike but for the model and its own settings. Returns None if
    they share neither QUALITY nor SIMILARITY.
    """
    records = in_order(records)
    shown = [name for name in (QUALITY, SIMILARITY) if name in metrics_of(*records)]
    if not shown:
        return None
    models = sorted({record.model for record in records})
    variants = _variants(records)
    lines = lines_of([], models)
    figure = Figure(figsize=(2.9 * len(variants) + 1, 2.9 * len(shown) + 1.2), layout="constrained")
    lowest = min([0.0, *(value for record in records for name in shown for value in relative_curve(record, name)
                         if math.isfinite(value))])
    for row, name in enumerate(shown):
        for column, variant in enumerate(variants):
            axes = figure.add_subplot(len(shown), len(variants), row * len(variants) + column + 1)
            measured = [record for record in records if record.variant == variant]
            for record in measured:
                band(axes, _rates(record), [relative_interval(name, point, record.dense)
                                            for point in all_points(record)], lines[record.model])
                plot(axes, _rates(record), relative_curve(record, name), lines[record.model])
            level(axes, 1)
            rate_axis(axes, [point.rate for record in measured for point in record.points])
            axes.set_xticks(axes.get_xticks()[::2], [label.get_text() for label in axes.get_xticklabels()][::2])
            axes.set_ylim(lowest - 0.05, 1.1)
            axes.set_title(variant.replace("+", "\n+") if row == 0 else "")
            axes.set_ylabel(f"{formula(name)}  ↑" if column == 0 else "")
    figure.axes[0].legend(handles=[legend_entry(model, lines[model]) for model in models], loc="lower left",
                          fontsize=9, frameon=False)
    figure.suptitle("What pruning does to each model, by pruning rate (↑ is better, dense = 1)")
    settings = "; ".join(f"{model}: {protocol(next(record for record in records if record.model == model))}"
                         for model in models)
    first = records[0]
    small_print(figure, [f"{first.dataset}, {counted(images_of(first), 'image')} at each rate; {settings}.",
                         f"{band_note(shown)} A gap: not finite."])
    return save(figure, path)
