"""Measure one pruning rate and show it beside the dense model.

example:
  python pruning/test_single_rate.py --rate 0.3 --method magnitude --num_images 10 --dataset coco
"""
from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)  # instead of pruning/, whose file names must not shadow packages

from pruning import cli, distributed
from pruning.metrics import METRICS
from pruning.pruning_analysis import add_arguments, sweep
from pruning.records import findings
from pruning.records.record import Record, read_record
from pruning.records.summaries import answer

__test__ = False  # its name looks like a test's to pytest


def table(record: Record) -> str:
    """Dense and pruned side by side, a line a quantity."""
    dense, point = record.dense, [*record.points, record.dense][0]  # at rate 0, dense is all there is
    rows = [("", "dense", f"{record.method} {point.rate:g}", "better", "95 % interval"),
            (f"sparsity ({point.unit})", f"{dense.sparsity:.4f}", f"{point.sparsity:.4f}", "", ""),
            ("parameters", f"{dense.parameters:,}", f"{point.parameters:,}", "", ""),
            ("nonzero parameters", f"{dense.nonzero_parameters:,}", f"{point.nonzero_parameters:,}", "", "")]
    for name, metric in METRICS.items():
        if name in point.metrics:
            both = [values.metrics[name] for values in (dense, point)]
            shown = ["not finite" if value is None else f"{value:.4g}" for value in both]
            low, high = findings.interval(name, point, dense)
            sure = f"{low:.4g} to {high:.4g}" if high > low else ""
            rows.append((f"{name} ({metric.unit})" if metric.unit else name, *shown, metric.better, sure))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d:<{widths[3]}}  {e}".rstrip()
                     for a, b, c, d, e in rows)


def main(argv=None) -> None:
    """Parse the command line, measure, print the table and where the record is."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--rate", type=cli.rate, required=True, help="the share to prune, from 0 up to, but not, 1")
    add_arguments(parser)
    parser.add_argument("--num_images", type=cli.positive, default=10, help="images to make")
    parser.add_argument("--results_dir", type=Path, default=ROOT / "results" / "single_rate",
                        help="where the record and its images go")
    args = parser.parse_args(argv)
    args.rates, args.overwrite = [args.rate], True  # a quick look replaces the last one
    path = sweep(args)
    if not distributed.first:
        return
    record = read_record(path)
    print(table(record))
    print(path)
    print(answer(record, args.tolerance))


if __name__ == "__main__":
    cli.run(main)
