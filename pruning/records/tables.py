"""Records -> tables as rows of text, and tables -> lines of text. No torch."""
from __future__ import annotations

import textwrap
from typing import List, NamedTuple, Sequence

from tabulate import tabulate

from pruning.metrics import METRICS
from pruning.records.findings import (
    ARROWS,
    COSTS,
    all_points,
    dense_cost,
    in_order,
    interval,
    metrics_of,
    paired_metrics,
    saved_share,
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

def metric_table(record: Record) -> Table:
    """A row a rate, a column a metric, with half the width of the 95 % interval."""
    metrics = metrics_of(record)
    rows = [[rate_label(point.rate), f"{point.sparsity:.3f}",
             *(number(point.metrics[name]) + _half_width(name, point, record.dense) for name in metrics)]
            for point in all_points(record)]
    paired = paired_metrics(metrics)
    notes = ["±: half the width of the 95 % interval" + (
        f"; for {listed(paired)} of the paired difference to dense, for others of the value" if paired else "")
        + ". The record holds both ends."]
    if any(None in point.metrics.values() for point in all_points(record)):
        notes.append("–: not finite, or without bound as for equal images")
    return Table("", ["rate", "sparsity", *map(_metric_head, metrics)], rows, notes)


def _metric_head(name: str) -> str:
    return f"{name} {ARROWS[METRICS[name].better]}\n{METRICS[name].unit}"


def _half_width(metric: str, point: Point, dense: Point) -> str:
    low, high = interval(metric, point, dense)
    return f" ± {float(f'{(high - low) / 2:.2g}'):g}" if high > low else ""


def cost_table(record: Record) -> Table:
    """A row a rate, a column a cost; times are ratios to the time of dense."""
    rows = []
    for point in all_points(record):
        row = {name: f"{getattr(point, name) / dense_cost(name, point, record.dense):.2f}" if cost.dense
               else number(cost.scale * getattr(point, name)) for name, cost in COSTS.items()}
        parameters, *others = row.values()
        rows.append([rate_label(point.rate), parameters, number(1e-6 * point.nonzero_parameters), *others])
    header = ["rate", "parameters\nmillion", "nonzero\nmillion", "weights\nMB", "peak memory\nMB", "MACs\nbillion",
              "call\n÷ dense", "image\n÷ dense"]
    return Table("Cost", header, rows, [
        "peak memory: of a denoiser call for one image, with the weights; MACs: multiply-accumulates of a call for one "
        "latent; call: time of a call for a batch; image: time of an image"])


def single_rate_table(record: Record) -> Table:
    """Dense and the first rate side by side, a row a quantity; dense twice if no other rate was measured."""
    dense, point = record.dense, [*record.points, record.dense][0]
    rows = [[f"sparsity ({point.unit})", f"{dense.sparsity:.4f}", f"{point.sparsity:.4f}", "", ""],
            ["parameters", f"{dense.parameters:,}", f"{point.parameters:,}", "", ""],
            ["nonzero parameters", f"{dense.nonzero_parameters:,}", f"{point.nonzero_parameters:,}", "", ""]]
    for name in metrics_of(record):
        metric = METRICS[name]
        values = [number(each.metrics[name]) if each.metrics[name] is not None else "not finite"
                  for each in (dense, point)]
        low, high = interval(name, point, dense)
        rows.append([f"{name} ({metric.unit})" if metric.unit else name, *values, metric.better,
                     f"{number(low)} to {number(high)}" if high > low else ""])
    header = ["", "dense", f"{record.variant} {point.rate:g}", "better", "95 % interval"]
    return Table("", header, rows, align=["left", "right", "right", "left", "left"])


# ---- several records

def comparison_tables(records: Sequence[Record]) -> List[Table]:
    """A table for each metric that all records have, and one of what is saved: a row a rate, a column a variant."""
    metrics = metrics_of(*records)
    tables = [_by_variant(records, f"{name}{f' [{METRICS[name].unit}]' if METRICS[name].unit else ''} "
                                   f"{ARROWS[METRICS[name].better]} {METRICS[name].better} is better",
                          lambda point, dense, name=name: number(point.metrics[name]) + _half_width(name, point, dense))
              for name in metrics]
    tables.append(_by_variant(records, "share of the denoiser's parameters removed or zeroed",
                              lambda point, dense: f"{saved_share(point, dense):.3f}"))
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
