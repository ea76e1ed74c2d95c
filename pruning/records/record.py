"""Records as JSON files: reading, writing, finding, merging and comparing them. No torch.

A record holds everything measured for one (model, dataset, variant). Every figure and
every text is made from records. A record is written whole or not at all.
"""
from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Dict, List

from pruning import UserError, methods, whole_file
from pruning.records import earlier
from pruning.records.schema import REAL_IMAGES, SETTINGS, Notes, Point, Record, build, check

SCHEMA_VERSION = 11
EARLIER = {3: earlier.from_version_3, 4: earlier.from_version_4, 5: earlier.from_version_5, 6: earlier.from_version_6,
           7: earlier.from_version_7, 8: earlier.from_version_8, 9: earlier.from_version_9, 10: earlier.from_version_10}


class BrokenRecordError(UserError):
    """Raised for a file that is not JSON: half-written, or never a record."""


def read_record(path) -> Record:
    """Read the record in a JSON file. Raises UserError that names the file and the field at fault.

    A file that is not JSON raises BrokenRecordError, which is a UserError.
    """
    try:
        return _parse(json.loads(Path(path).read_bytes(), parse_constant=no_constant))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BrokenRecordError(f"{path} is not JSON: {error}") from None
    except RecursionError:
        raise BrokenRecordError(f"{path} is not a record: it is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{path} is not a record that this program can read: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def no_constant(name):
    """Refuse NaN and infinity, which Python's reader of JSON takes. For its parse_constant."""
    raise ValueError(f"{name} is not a number in JSON")


def _parse(data) -> Record:
    """Make a Record of decoded JSON. Raises ValueError that names the field at fault."""
    if not isinstance(data, dict):
        raise ValueError("it must be an object")
    if data.get("synthetic"):
        raise ValueError("it is synthetic: an illustration, not a measurement")
    if "schema_version" not in data:
        raise ValueError("schema_version is missing")
    version = data["schema_version"]
    if isinstance(version, int) and version in EARLIER:
        data = EARLIER[version](data)
    elif version != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {version!r:.40}, expected 3 to {SCHEMA_VERSION}; "
                         "measure again, or draw it with the program that wrote it")
    record = build(Record, {name: value for name, value in data.items() if name != "schema_version"}, "")
    check(record.settings, SETTINGS, "settings.")
    record.notes = build(Notes, record.notes, "notes.")
    record.dense = build(Point, record.dense, "dense.")
    record.points = [build(Point, point, f"points[{i}].") for i, point in enumerate(record.points)]
    _check_consistency(record)
    if version in EARLIER:
        earlier.renew_intervals(record)
    return record


def _check_consistency(record: Record) -> None:
    """Check fields against each other. Raises ValueError that names the field at fault."""
    if record.dense.rate != 0:
        raise ValueError("dense.rate must be 0")
    rates = [point.rate for point in record.points]
    for i in range(1, len(rates)):
        if rates[i] <= rates[i - 1]:
            raise ValueError(f"points[{i}].rate is {rates[i]} after {rates[i - 1]}; rates must ascend")
    points = {"dense": record.dense, **{f"points[{i}]": point for i, point in enumerate(record.points)}}
    for where, point in points.items():
        if set(point.metrics) != set(record.dense.metrics):
            raise ValueError(f"{where}.metrics must have the names of dense.metrics")
        for name, values in point.per_image.items():
            if len(values) != len(record.samples) * record.settings["seeds"]:
                raise ValueError(f"{where}.per_image.{name} has {len(values)} values for {len(record.samples)} samples "
                                 f"and {record.settings['seeds']} seeds")


def write_record(record: Record, path) -> None:
    """Write a record as JSON, whole or not at all. NaN and infinity become null.

    Raises ValueError that names the field if the record could not be read again.
    """
    data = {"schema_version": SCHEMA_VERSION, **plain(record)}
    _parse(data)
    write_json(data, path)


def plain(value):
    """Return `value` as lists, dicts and Python numbers, with None for numbers that are not finite."""
    if type(value) is float:  # first, as nearly all values of a record are
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # a numpy array or number
        return plain(value.tolist())
    return value


def write_json(data, path) -> None:
    """Write JSON, whole or not at all. Raises ValueError for NaN and infinity, UserError if the disk refuses."""
    text = _layout(data) + "\n"
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def _layout(value, indent: str = "") -> str:
    """Return JSON text in which each list or object that holds no other is one line, however long."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not any(isinstance(item, (dict, list)) for item in items):
        return json.dumps(value, allow_nan=False)
    inner = indent + "  "
    if isinstance(value, dict):
        lines = [f"{json.dumps(name)}: {_layout(item, inner)}" for name, item in value.items()]
    else:
        lines = [_layout(item, inner) for item in value]
    left, right = "{}" if isinstance(value, dict) else "[]"
    return left + "\n" + ",\n".join(inner + line for line in lines) + "\n" + indent + right


def find_records(results_dir, pattern: str = "*/*/*.json") -> List[Path]:
    """Return the records in a results folder, sorted: JSON files at MODEL/DATASET/NAME.json with a schema version.

    pattern: where they lie in another folder. Raises UserError if the folder or a file in it cannot be read.
    """
    if not Path(results_dir).is_dir():
        raise UserError(f"there is no folder {results_dir}; run a sweep first, or name one with --results_dir")
    try:
        return sorted(path for path in Path(results_dir).glob(pattern)
                      if path.is_file() and b'"schema_version"' in path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None


def folder_name(model: str) -> str:
    """Return a model's name as one safe path component: 'org/model' becomes 'org--model'.

    Raises UserError if nothing of the name is left.
    """
    name = re.sub(r"[^\w.-]", "_", re.sub(r"[/\\]+", "--", model), flags=re.ASCII).strip("-.")
    if not name:
        raise UserError(f"cannot name a results folder after the model {model!r}")
    return name


def record_path(results_dir, model: str, dataset: str, variant: str, shard=None) -> Path:
    """Return the path of the record of (model, dataset, variant), or of its shard (i, n)."""
    part = ".{}of{}".format(*shard) if shard else ""
    return Path(results_dir) / folder_name(model) / dataset / f"{variant}{part}.json"


def merge(found: Dict[Path, Record]) -> Record:
    """Merge the shards of one record, given by path, into one. The first gives dense and the settings.

    A rate that two shards hold alike counts once. Raises UserError if two shards were measured differently, or hold the
    same rate with other values.
    """
    (first, merged), *others = found.items()
    merged = dataclasses.replace(merged, points=list(merged.points))
    path_of = {point.rate: first for point in merged.points}
    for path, record in others:
        differences = protocol_differences(merged, record, continuing=True)
        if differences:
            raise UserError(f"{first} and {path} were measured differently: {'; '.join(differences)}")
        for point in record.points:
            if point in merged.points:
                continue
            if point.rate in path_of:
                raise UserError(f"{path_of[point.rate]} and {path} both hold rate {point.rate:g} of {record.variant} "
                                f"on {record.model}; move one away, or choose one with --results_file")
            path_of[point.rate] = path
            merged.points.append(point)
        if set(record.dense.metrics) != set(merged.dense.metrics):
            raise UserError(f"{first} and {path} hold different metrics; measure the missing ones first")
    merged.points.sort(key=lambda point: point.rate)
    merged.notes = dataclasses.replace(merged.notes, rates=sorted(
        {rate for record in found.values() for rate in record.notes.rates}))
    return merged


def protocol_differences(a: Record, b: Record, continuing: bool = False) -> List[str]:
    """Return how two records were measured differently, as 'steps: 20 and 30'; empty if they may share a figure.

    continuing: whether one record is to continue the other. Then the method and its options must be equal too, and
    the metrics may differ.
    """
    pairs = [("model", a.model, b.model), ("dataset", a.dataset, b.dataset)]
    if continuing:
        pairs.append(("method", a.method, b.method))
        pairs += _pairs("", _with_defaults(a), _with_defaults(b)) if a.method == b.method else []
    pairs += [pair for pair in _pairs("", a.settings, b.settings)
              if not (continuing and (pair[0] == "metrics" or pair[0] in REAL_IMAGES and None in pair[1:]))]
    pairs += [pair for pair in _pairs("backbones.", a.backbones, b.backbones)
              if not (continuing and None in pair[1:])]  # of a metric that only one record has
    pairs += _pairs("versions.", a.versions, b.versions)
    differences = [f"{name}: {_shown(left)} and {_shown(right)}" for name, left, right in pairs if left != right]
    if len(a.samples) != len(b.samples):
        differences.append(f"samples: {len(a.samples)} and {len(b.samples)}")
    elif a.samples != b.samples:
        first = next((x, y) for x, y in zip(a.samples, b.samples) if x != y)
        differences.append("samples: " + " and ".join("{id} ({caption})".format(**sample) for sample in first))
    return differences


def _with_defaults(record: Record) -> dict:
    """Return the options of a record, and the defaults of options that the method did not have when it was written."""
    known = methods.METHODS[record.method].options if record.method in methods.METHODS else {}
    return {**{name: option.default for name, option in known.items()}, **record.options}


def _pairs(prefix: str, left: dict, right: dict) -> List[tuple]:
    """Return (name, value on the left, value on the right) of all names, None for a value that is absent."""
    return [(prefix + name, left.get(name), right.get(name)) for name in {**left, **right}]


def _shown(value) -> str:
    return "none" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
