"""Merge the shards of each record that --shard measured apart into one record, and draw it.

example:
  python pruning/merge_results.py --results_dir results
"""
from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)  # instead of pruning/, whose file names must not shadow packages

from pruning import UserError, cli
from pruning.records import report
from pruning.records.answers import answer
from pruning.records.comparability import by_variant
from pruning.records.record import find_records, merge, read_record, write_record
from pruning.records.store import only_writer


def main(argv=None) -> None:
    """Parse the command line, merge all shards in memory, then write each record, remove its shards and draw it."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--results_dir", metavar="DIR", type=Path, default=cli.RESULTS, help="where records are")
    parser.add_argument("--partial", action="store_true",
                        help="merge although rates of the sweep are missing, and keep the parts")
    cli.add_tolerance(parser)
    args = parser.parse_args(argv)

    found = {path: read_record(path) for path in find_records(args.results_dir)}
    merged = [(merge(shards), shards) for shards in by_variant(found).values()
              if len(shards) > 1 or [path.stem for path in shards] != [next(iter(shards.values())).variant]]
    if not merged:
        raise UserError(f"no record in {args.results_dir} has shards")
    for record, shards in merged:
        missing = sorted(set(record.notes.rates) - {point.rate for point in record.points})
        if missing and not args.partial:
            raise UserError(f"the shards of {record.variant} in {min(shards).parent} lack the rates "
                            f"{', '.join(f'{rate:g}' for rate in missing)}; measure these, or give --partial to merge "
                            "what is there and keep the parts")
    for record, shards in merged:
        path = min(shards).with_name(f"{record.variant}.json")
        with ExitStack() as locks:
            for each in {path, *shards}:
                locks.enter_context(only_writer(each))
            write_record(record, path)
            for shard in set() if args.partial else set(shards) - {path}:
                shard.unlink()
        report.write_record_files(record, path.parent, path.parent / "images", args.tolerance)
        report.remake_report(path, record, args.tolerance)
        print(path)
        print(answer(record, args.tolerance))


if __name__ == "__main__":
    cli.run(main)
