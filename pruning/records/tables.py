"""Records -> tables as rows of text, and tables -> lines of text. No torch."""
from __future__ import annotations

import csv
import io
import math
import textwrap
from typing import List, NamedTuple, Sequence

from tabulate import tabulate

from pruning.metrics import METRICS
from pruning.records.findings import (
    ARROWS,
    QUALITY,
    SAME,
    TIMES,
    TOLERANCE,
    all_points,
    drawn_metrics,
    failures,
    images_of,
    in_order,
    interval,
    is_baseline,
    metrics_of,
    paired_metrics,
    same_time,
    saved_macs,
    saved_parameters,
    time_ratio,
)
from pruning.records.record import Point, Record
from pruning.records.words import listed, number, rate_label

WIDTH = 110  # letters of a line of prose


class Table(NamedTuple):
    """Rows of text, with a title above and notes below. str() lays them out as lines of text."""

    title: str
    header: Sequence[str]  # may have several lines: units, or the options of a variant
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    align: Sequence[str] = ()  # "left" or "right" for each column; all right if empty

    def __str__(self) -> str:
        lines = tabulate([list(row) for row in self.rows], list(self.header), tablefmt="simple", disable_numparse=True,
                         colalign=self.align or ["right"] * len(self.header)).splitlines()
        return "\n".join([*([self.title] if self.title else []), *map(str.rstrip, lines), *map(wrapped, self.notes)])


def wrapped(prose: str) -> str:
    """Break a paragraph into lines, those after the first indented."""
    return textwrap.fill(prose, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


# ---- one record

def metric_table(record: Record, tolerance: float = TOLERANCE) -> Table:
    """A row a rate, a column a metric with how far its 95 % interval reaches, and the images that lost much."""
    metrics, dense = metrics_of(record), record.dense
    rows = [[rate_label(point.rate), f"{point.sparsity:.3f}",
             *(number(point.metrics[name]) + _reach(name, point, dense) for name in metrics)]
            for point in all_points(record)]
    header, paired = ["rate", "sparsity", *map(_metric_head, metrics)], paired_metrics(metrics)
    notes = ["± or −/+: how far the 95 % interval reaches" + (
        f"; for {listed(paired)} of the paired difference to dense, for others of the value" if paired else "")]
    if failures(dense, dense, tolerance):
        rows = [[*row, failures_cell(point, dense, tolerance)] for row, point in zip(rows, all_points(record))]
        header.append(f"lose over\n{100 * tolerance:g} %")
        notes.append(f"lose over {100 * tolerance:g} %: how many of the {images_of(record)} images lost more than this "
                     f"share of dense's {QUALITY} beside the dense image of the same noise, and the largest loss")
    if any(None in point.metrics.values() for point in all_points(record)):
        notes.append("–: not finite, or without bound as for equal images")
    return Table("", header, rows, notes)


def failures_cell(point: Point, dense: Point, tolerance: float) -> str:
    """Return '4, −17 %': how many images lost more than the tolerance, and the largest loss; "" if unknown."""
    found = failures(point, dense, tolerance)
    return "" if found is None else f"{found[0]}, −{100 * found[1]:.0f} %" if found[0] else "0"


def _metric_head(name: str) -> str:
    return f"{name} {ARROWS[METRICS[name].better]}\n{METRICS[name].unit}"


def _reach(metric: str, point: Point, dense: Point) -> str:
    """Return ' ± 2', or ' −3/+1' for an interval that reaches clearly further on one side; "" if there is none."""
    low, high = interval(metric, point, dense)
    if point.metrics[metric] is None or not high > low:
        return ""
    below, above = point.metrics[metric] - low, high - point.metrics[metric]
    even = abs(above - below) <= 0.1 * (above + below)
    below, middle, above = (f"{float(f'{reach:.2g}'):g}" for reach in (below, (below + above) / 2, above))
    return f" ± {middle}" if even else f" −{below}/+{above}"


def cost_table(record: Record) -> Table:
    """A row a rate, a column a cost; times are ratios to the time of dense, with their 95 % intervals."""
    rows = [[rate_label(point.rate), number(1e-6 * point.parameters), number(1e-6 * point.nonzero_parameters),
             number(1e-6 * point.weight_bytes), _in_file(point), number(1e-6 * point.peak_bytes),
             number(1e-9 * point.macs), *(time_cell(name, point, record.dense) for name in TIMES)]
            for point in all_points(record)]
    header = ["rate", "parameters\nmillion", "nonzero\nmillion", "in memory\nMB", "in a file\nMB", "peak memory\nMB",
              "MACs\nbillion", "call\n÷ dense", "image\n÷ dense"]
    notes = [
        "in memory, in a file: the weights as they run, and as a saved file holds them: in half precision if no weight "
        "changes by that",
        "peak memory: of a denoiser call for one image, with the weights; MACs: multiply-accumulates of a call for one "
        "latent",
        "call: time of a call for a batch; image: time of an image; with the 95 % interval of ratios measured in turn; "
        f"no difference: it comes within {100 * SAME:g} % of 1"]
    if is_baseline(record):
        notes.append("call of a baseline: the time of all calls for a batch of images, beside that of dense's calls; a "
                     "whole call costs the memory and MACs of dense")
    if any("–" in row for row in rows):
        notes.append("–: an earlier version of this program measured, which did not note the size of a saved file, nor "
                     "how sure times are; masks do the same work as dense, so their ratios are left out")
    return Table("Cost", header, rows, notes)


def _in_file(point: Point) -> str:
    return number(point.file_bytes and 1e-6 * point.file_bytes)


def time_cell(name: str, point: Point, dense: Point) -> str:
    """Return '0.72 (0.70 to 0.74)', 'no difference' if it cannot be told from 1, '0.72' or '–' without one."""
    ratio, low, high = time_ratio(name, point, dense)
    if same_time(name, point, dense):
        return "no difference"
    if math.isnan(ratio):
        return "–"
    return f"{ratio:.2f}" + ("" if math.isnan(low) else f" ({low:.2f} to {high:.2f})")


def single_rate_table(record: Record, tolerance: float = TOLERANCE) -> Table:
    """Dense and the first rate side by side, a row a quantity; dense twice if no other rate was measured."""
    dense, point = record.dense, [*record.points, record.dense][0]
    rows = [[f"sparsity ({point.unit})", f"{dense.sparsity:.4f}", f"{point.sparsity:.4f}", "", ""],
            ["parameters", f"{dense.parameters:,}", f"{point.parameters:,}", "", ""],
            ["nonzero parameters", f"{dense.nonzero_parameters:,}", f"{point.nonzero_parameters:,}", "", ""],
            ["weights in memory (MB)", *(number(1e-6 * each.weight_bytes) for each in (dense, point)), "", ""],
            ["weights in a saved file (MB)", *map(_in_file, (dense, point)), "", ""]]
    for name in metrics_of(record):
        metric = METRICS[name]
        values = [number(each.metrics[name]) if each.metrics[name] is not None else "not finite"
                  for each in (dense, point)]
        low, high = interval(name, point, dense)
        rows.append([f"{name} ({metric.unit})" if metric.unit else name, *values, metric.better,
                     f"{number(low)} to {number(high)}" if high > low else ""])
    lost = failures_cell(point, dense, tolerance)
    if lost:
        rows.append([f"images that lose over {100 * tolerance:g} % of {QUALITY}", "0", lost, "lower", ""])
    header = ["", "dense", f"{record.variant} {point.rate:g}", "better", "95 % interval"]
    return Table("", header, rows, align=["left", "right", "right", "left", "left"])


# ---- several records

def comparison_tables(records: Sequence[Record], tolerance: float = TOLERANCE) -> List[Table]:
    """Tables of a row a rate and a column a variant: of each metric that all records have, and of what is saved."""
    metrics = drawn_metrics(*records)
    tables = [_by_variant(records, f"{name}{f' [{METRICS[name].unit}]' if METRICS[name].unit else ''} "
                                   f"{ARROWS[METRICS[name].better]} {METRICS[name].better} is better",
                          lambda point, dense, name=name: number(point.metrics[name]) + _reach(name, point, dense))
              for name in metrics]
    if QUALITY in metrics:
        tables.append(_by_variant(
            records, f"images that lose over {100 * tolerance:g} % of {QUALITY}, and the largest loss",
            lambda point, dense: failures_cell(point, dense, tolerance)))
    tables.append(_by_variant(records, "share of the denoiser's parameters removed or zeroed",
                              lambda point, dense: f"{saved_parameters(point, dense):.3f}"))
    tables.append(_by_variant(records, "share of the denoiser's multiply-accumulates saved",
                              lambda point, dense: f"{saved_macs(point, dense):.3f}"))
    tables.append(_by_variant(records, "time of an image ÷ dense",
                              lambda point, dense: time_cell("image_seconds", point, dense)))
    return tables


def _by_variant(records: Sequence[Record], title: str, cell) -> Table:
    records = in_order(records)
    rates = sorted({point.rate for record in records for point in all_points(record)})
    points = [{point.rate: point for point in all_points(record)} for record in records]
    rows = [[rate_label(rate), *(cell(of_rate[rate], record.dense) if rate in of_rate else ""
                                 for of_rate, record in zip(points, records))] for rate in rates]
    return Table(title, ["rate", *(record.variant.replace("+", "\n+") for record in records)], rows)


# ---- the sensitivity of layers

def sensitivity_table(found: dict, names: Sequence[str]) -> Table:
    """A row a layer, a column a rate with the change of the output, then the layer's shares of the denoiser."""
    rows = [[name, *(f"{100 * change:.3g}" for change in found["layers"][name]["change"]),
             f"{100 * found['layers'][name]['parameters']:.2f}", f"{100 * found['layers'][name]['macs']:.2f}"]
            for name in names]
    header = ["layer", *(f"{rate:g}" for rate in found["rates"]), "parameters", "MACs"]
    return Table("Change of the guided output at each rate of the layer, and the layer's share of the denoiser, in %",
                 header, rows, align=["left"] + ["right"] * (len(header) - 1))


# ---- every point

def results_csv(records: Sequence[Record]) -> str:
    """Return every point of the records as comma-separated values: a row a point, a column a number.

    A metric has the two ends of its 95 % interval beside it, in its own unit. What is not known is empty.
    """
    fields = [name for name, value in vars(records[0].dense).items() if not isinstance(value, (dict, list))]
    metrics = [name for name in METRICS if any(name in record.dense.metrics for record in records)]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["model", "dataset", "variant", *fields,
                    *(name + end for name in metrics for end in ("", "_low", "_high"))])
    for record in in_order(records):
        for point in all_points(record):
            ends = {name: interval(name, point, record.dense) for name in point.metrics}
            table.writerow([record.model, record.dataset, record.variant, *(getattr(point, name) for name in fields),
                            *("" if value is None or value != value else value for name in metrics
                              for value in (point.metrics.get(name), *ends.get(name, ("", ""))))])
    return text.getvalue()
