"""Measure one pruning rate and show it beside the dense model.

example:
  python pruning/test_single_rate.py --rate 0.3 --method magnitude --num_images 10 --dataset coco
"""
from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)  # instead of pruning/, whose file names must not shadow packages

from pruning import cli, distributed, sweep
from pruning.pruning_analysis import run_pruning_experiment
from pruning.records.tables import single_rate_table

OWN = cli.RESULTS / "single_rate"
__test__ = False  # pytest takes the file's name for a test's


def main(argv=None) -> None:
    """Parse the command line, measure, print the table, where it is written and what to try next."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--rate", type=cli.rate, required=True, help="the share to prune, in [0, 1)")
    cli.add_measuring_flags(parser)
    parser.add_argument("--num_images", type=cli.positive, default=10, help="images to make")
    parser.add_argument("--results_dir", type=Path, default=OWN,
                        help="where the record and its images go; a record that is there and was measured alike gets "
                             "the rate as well")
    args = parser.parse_args(argv)
    args.rates = [args.rate]
    if args.results_dir == OWN:  # a quick look replaces the last one, and never what another command made
        args.overwrite = True
    path, record = sweep.sweep(args, run_pruning_experiment)
    if distributed.is_main:
        record = replace(record, points=[point for point in record.points if point.rate == args.rate])
        print(single_rate_table(record, args.tolerance))
        sweep_command = [ROOT / "pruning" / "pruning_analysis.py", *(sys.argv[1:] if argv is None else argv)]
        print(cli.closing(args, record, path, sweep_command, drop=["--rate", "--results_dir"]))


if __name__ == "__main__":
    cli.run(main)
