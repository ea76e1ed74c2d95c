"""Which records belong together: shards of one record, variants of one model, several models. No torch."""
from __future__ import annotations

from pathlib import Path
from typing import Dict, List, Sequence, Tuple

from pruning import UserError, check_name
from pruning.records.record import Record, find_records, merge, protocol_differences, read_record

Found = Dict[Path, Record]

# The settings in which two models may differ and still share a figure.
MODEL_SETTINGS = ("model", "denoiser", "pipeline", "configs", "steps", "guidance_scale")


def read_records(paths: Sequence[Path], variants: Sequence[str] = ()) -> Found:
    """Read records by path, of these variants only if any are given, with the shards of a record merged.

    Raises UserError if a file is not a record, a variant has no record, or there is nothing to read.
    """
    found = {path: read_record(path) for path in paths}
    if not found:
        raise UserError("there is no record to draw; run a sweep first")
    measured = list(dict.fromkeys(record.variant for record in found.values()))
    for variant in variants:
        check_name("variant", variant, measured)
    chosen = {path: record for path, record in found.items() if not variants or record.variant in variants}
    return {min(shards): merge(shards) for shards in by_variant(chosen).values()}


def by_variant(found: Found) -> Dict[Tuple[str, str, str], Found]:
    """Group records by (model, dataset, variant): several in one group are shards of one record."""
    groups: Dict[Tuple[str, str, str], Found] = {}
    for path, record in found.items():
        groups.setdefault((record.model, record.dataset, record.variant), {})[path] = record
    return groups


def by_dataset(found: Found) -> Dict[Tuple[str, str], Found]:
    """Group records by (model, dataset): those of one group may be compared."""
    groups: Dict[Tuple[str, str], Found] = {}
    for path, record in found.items():
        groups.setdefault((record.model, record.dataset), {})[path] = record
    return groups


def comparable(found: Found, force: bool = False) -> List[Tuple[Found, str]]:
    """Return the groups of at least two variants, each with a warning of how they were measured differently.

    The warning is "" if they were measured alike. Raises UserError if there is no such group, or if the records of a
    group were measured differently and `force` is not given.
    """
    groups = [group for group in by_dataset(found).values() if len(group) > 1]
    if not groups:
        raise UserError(f"--compare needs two variants of one model and dataset; found {', '.join(map(str, found))}")
    warned = []
    for group in groups:
        (first, reference), *others = group.items()
        differences = {path: protocol_differences(reference, record) for path, record in others}
        texts = [f"{first} and {path} were measured differently ({'; '.join(names)})"
                 for path, names in differences.items() if names]
        if texts and not force:
            raise UserError(f"{'; '.join(texts)}: measure them alike, or draw them with a warning by --force")
        warned.append((group, "; ".join(dict.fromkeys(name for names in differences.values() for name in names))))
    return warned


def measured_alike(found: Found) -> Tuple[Found, List[str]]:
    """Return the records that were measured as the first one was, and why the others do not join it."""
    (path, first), *others = found.items()
    alike, reasons = {path: first}, []
    for other, record in others:
        differences = protocol_differences(first, record)
        if differences:
            reasons.append(f"{other.name} was measured differently: {'; '.join(differences)}")
        else:
            alike[other] = record
    return alike, reasons


def beside(path: Path, record: Record) -> Tuple[Found, List[str]]:
    """Return a record and those of its folder that were measured as it was, and why others do not join it."""
    others, reasons = {}, []
    for other in find_records(path.parent, "*.json"):
        try:
            others[other] = read_record(other)
        except UserError as error:
            reasons.append(str(error))
    found = {path: record}
    for (_, _, variant), shards in by_variant(others).items():
        try:
            found.update({min(shards): merge(shards)} if variant != record.variant else {})
        except UserError as error:
            reasons.append(str(error))
    alike, differing = measured_alike(found)
    return alike, [*reasons, *differing]


def of_several_models(groups: Sequence[Found]) -> Tuple[List[List[Record]], List[str]]:
    """Return the records of each dataset on which several models were measured alike, and why others do not join.

    Each group holds the records of one model and dataset. The first group of a dataset is the reference.
    """
    datasets: Dict[str, List[Found]] = {}
    for group in groups:
        datasets.setdefault(next(iter(group.values())).dataset, []).append(group)
    found, reasons = [], []
    for dataset, (first, *others) in datasets.items():
        (path, reference), together = next(iter(first.items())), list(first.values())
        for group in others:
            other, record = next(iter(group.items()))
            differences = [text for text in protocol_differences(reference, record)
                           if text.partition(":")[0] not in MODEL_SETTINGS]
            if differences:
                reasons.append(f"{path} and {other} share no figure of {dataset}: {'; '.join(differences)}")
            else:
                together += group.values()
        if len({record.model for record in together}) > 1:
            found.append(together)
    return found, reasons
