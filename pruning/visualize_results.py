"""Draw records again: figures and summary of each record, or with --compare all variants together; and the report.

example:
  python pruning/visualize_results.py --methods magnitude structured --compare
"""
from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)  # instead of pruning/, whose file names must not shadow packages

from pruning import cli
from pruning.progress import tqdm
from pruning.records import report
from pruning.records.answers import answer
from pruning.records.comparability import by_dataset, comparable, measured_alike, of_several_models, read_records
from pruning.records.findings import in_order
from pruning.records.record import find_records, folder_name


def main(argv=None) -> None:
    """Parse the command line, read and check all records, draw them, and print the paths written."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--results_file", metavar="FILE", type=Path,
                        help="draw this record only (default: all below --results_dir)")
    parser.add_argument("--methods", metavar="VARIANT", nargs="+",
                        help="draw these variants only: a method by its name, with options as its record is named")
    parser.add_argument("--output_dir", metavar="DIR", type=Path, help="write here instead of beside each record")
    parser.add_argument("--compare", action="store_true", help="draw the variants of one model and dataset together")
    parser.add_argument("--force", action="store_true",
                        help="with --compare: draw records that were measured differently too, with a warning")
    cli.add_tolerance(parser)
    parser.add_argument("--results_dir", metavar="DIR", type=Path, default=cli.RESULTS, help="where records are")
    args = parser.parse_args(argv)

    found = read_records([args.results_file] if args.results_file else find_records(args.results_dir),
                         args.methods or ())
    warned = comparable(found, args.force) if args.compare else [(group, "") for group in by_dataset(found).values()]
    tasks = []  # function and arguments, which return the paths written
    for group, warning in warned:
        folder = _folder(args.output_dir, group, alone=len(warned) == 1)
        together = folder or next(iter(group)).parent
        if args.compare:
            tasks.append((report.write_comparison, group, together, args.tolerance, warning))
        else:
            tasks += [(_draw, record, folder or path.parent, path.parent / "images", args.tolerance)
                      for path, record in group.items()]
        if folder or warning:
            alike, left_out = (group, []) if warning else measured_alike(group)
            tasks.append((report.write_report, alike, folder or together, args.tolerance, warning, left_out))
        else:  # the report of a folder is of all its records, also if some are drawn only
            tasks.append((report.remake_report, *next(iter(group.items())), args.tolerance))
    if args.compare:
        of_models, reasons = of_several_models([group for group, _ in warned])
        tasks += [(report.write_models, records, args.output_dir or args.results_dir) for records in of_models]
        for reason in reasons:
            print(reason, file=sys.stderr)
    for function, *arguments in tqdm(tasks, desc="drawing", leave=False):
        for path in function(*arguments):
            tqdm.write(str(path))
    for group, _ in warned:
        for record in in_order(list(group.values())):
            print(answer(record, args.tolerance))


def _folder(output_dir, group, alone: bool):
    """Return where the files of a group go, None for beside its records. Several groups must not share a folder."""
    record = next(iter(group.values()))
    return output_dir if alone or output_dir is None else output_dir / folder_name(record.model) / record.dataset


def _draw(record, folder, images_folder, tolerance) -> list:
    written = report.write_record_files(record, folder, images_folder, tolerance)
    for path in report.record_files(record, folder):
        if path not in written:
            why = f"{images_folder} holds no image of {record.variant}" if path.name.endswith("_images.png") \
                else "its record does not hold what it shows"
            tqdm.write(f"{path.name} is not drawn: {why}", file=sys.stderr)
    return written


if __name__ == "__main__":
    cli.run(main)
