"""Make one record of the parts that --shard measured apart, and draw it.

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
from pruning.records import plots
from pruning.records.record import find_records, merge, read_record, write_record
from pruning.records.store import only_writer
from pruning.records.summaries import answer


def main(argv=None) -> None:
    """Parse, read and merge everything, then write each whole record and remove its parts."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--results_dir", metavar="DIR", type=Path, default=ROOT / "results", help="where records are")
    cli.add_tolerance(parser)
    args = parser.parse_args(argv)

    parts = {}
    for path in find_records(args.results_dir):
        record = read_record(path)
        parts.setdefault((path.parent, record.method), {})[path] = record
    merged = {folder / f"{method}.json": (merge(several), several) for (folder, method), several in parts.items()
              if len(several) > 1}
    if not merged:
        raise UserError(f"no record in {args.results_dir} lies there in parts")
    for path, (record, several) in merged.items():
        with ExitStack() as locks:
            for each in {path, *several}:
                locks.enter_context(only_writer(each))
            write_record(record, path)
            for part in set(several) - {path}:
                part.unlink()
        plots.draw_all(record, path.parent, path.parent / "images", args.tolerance)
        print(path)
        print(answer(record, args.tolerance))


if __name__ == "__main__":
    cli.run(main)
