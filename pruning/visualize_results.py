"""Draw records again: the graphs and the summary of each, or with --compare the methods together.

example:
  python pruning/visualize_results.py --methods magnitude structured --compare
"""
from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)  # instead of pruning/, whose file names must not shadow packages

from tqdm import tqdm

from pruning import UserError, check_name, cli
from pruning.methods import METHODS
from pruning.records import plots
from pruning.records.findings import in_order
from pruning.records.record import find_records, folder_name, merge, protocol_differences, read_record
from pruning.records.summaries import answer


def main(argv=None) -> None:
    """Parse, read and check everything, then draw; print the paths written."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--results_file", metavar="FILE", type=Path,
                        help="one record; without it, all below --results_dir")
    parser.add_argument("--methods", metavar="METHOD", nargs="+", help="draw these only: " + ", ".join(METHODS))
    parser.add_argument("--output_dir", metavar="DIR", type=Path, help="write here instead of beside each record")
    parser.add_argument("--compare", action="store_true", help="draw the methods of one model and dataset together")
    parser.add_argument("--force", action="store_true",
                        help="with --compare: draw records that were measured differently too, with a warning in it")
    cli.add_tolerance(parser)
    parser.add_argument("--results_dir", metavar="DIR", type=Path, default=ROOT / "results", help="where records are")
    args = parser.parse_args(argv)

    found = read_records([args.results_file] if args.results_file else find_records(args.results_dir), args.methods)
    groups = {}  # of one model and dataset each
    for path, record in found.items():
        groups.setdefault((record.model, record.dataset), {})[path] = record
    if args.compare:
        groups = {pair: records for pair, records in groups.items() if len(records) > 1}
        warnings = check_comparable(groups, found, args.force)

    tasks = []
    for (model, dataset), records in groups.items():
        into = args.output_dir
        if into and len(groups) > 1:  # or their files would take each other's place
            into = into / folder_name(model) / dataset
        if args.compare:
            tasks.append((plots.compare_all, list(records.values()), into or next(iter(records)).parent,
                          args.tolerance, warnings[model, dataset]))
        else:
            tasks += [(plots.draw_all, record, into or path.parent, path.parent / "images", args.tolerance)
                      for path, record in records.items()]
    if args.compare:
        tasks += [(plots.compare_models, records, args.output_dir or args.results_dir)
                  for records in of_several_models(groups)]
    for draw, *arguments in tqdm(tasks, desc="drawing", leave=False):
        written = draw(*arguments)
        for path in written:
            tqdm.write(str(path))
        if draw is plots.draw_all and not any(path.name.endswith("_images.png") for path in written):
            tqdm.write(f"no figure of the images of {arguments[0].method}: {arguments[2]} does not hold them",
                       file=sys.stderr)
    for records in groups.values():
        for record in in_order(list(records.values())):
            print(answer(record, args.tolerance))


def read_records(paths, methods=None) -> dict:
    """Path -> record, of these methods; parts measured apart are one. Raises UserError where a method has none."""
    found = {path: read_record(path) for path in paths}
    for method in methods or []:
        check_name("method", method, list(dict.fromkeys([*METHODS, *(record.method for record in found.values())])))
        if all(record.method != method for record in found.values()):
            raise UserError(f"there is no record of the method {method}; measure it first, or leave it out")
    found = {path: record for path, record in found.items() if not methods or record.method in methods}
    if not found:
        raise UserError("there is no record to draw; run a sweep first")
    parts = {}
    for path, record in found.items():
        parts.setdefault((record.model, record.dataset, record.method), {})[path] = record
    return {min(several): merge(several) for several in parts.values()}


# What two models may differ in and still share a figure.
MODEL_SETTINGS = ("model", "denoiser", "pipeline", "steps", "guidance_scale")


def of_several_models(groups) -> list:
    """The records of each data set that several models were measured on; models measured otherwise are named."""
    datasets = {}
    for (_, dataset), records in groups.items():
        datasets.setdefault(dataset, []).append(records)
    found = []
    for dataset, (first, *others) in datasets.items():
        (path, reference), together = next(iter(first.items())), list(first.values())
        for records in others:
            other, record = next(iter(records.items()))
            differences = [text for text in protocol_differences(reference, record)
                           if text.partition(":")[0] not in MODEL_SETTINGS]
            if differences:
                print(f"{path} and {other} share no figure of {dataset}: {'; '.join(differences)}", file=sys.stderr)
            else:
                together += records.values()
        if len({record.model for record in together}) > 1:
            found.append(together)
    return found


def check_comparable(groups, found, force: bool = False) -> dict:
    """What differs in the measuring of each group's records, "" if nothing: {(model, dataset): words}.

    Raises UserError where a group has one method alone, and for a difference unless forced.
    """
    if not groups:
        raise UserError(f"--compare needs two methods of one model and dataset; found {', '.join(map(str, found))}")
    warnings = {}
    for pair, records in groups.items():
        (first, reference), *others = records.items()
        differences = {f"{first} and {path} were measured differently ({'; '.join(different)})": different
                       for path, record in others
                       for different in [protocol_differences(reference, record)] if different}
        if differences and not force:
            raise UserError(f"{'; '.join(differences)}: measure them alike, or draw them all the same with --force")
        warnings[pair] = "; ".join(dict.fromkeys(text for several in differences.values() for text in several))
    return warnings


if __name__ == "__main__":
    cli.run(main)
