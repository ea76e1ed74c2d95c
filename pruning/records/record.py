"""Points and records, and the JSON they live in. No torch.

A record holds everything measured for one (model, dataset, method). Every figure and
every summary is drawn from it, and it is written whole or not at all.
"""
from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List

from pruning import UserError, whole_file
from pruning.methods import METHODS

SCHEMA_VERSION = 3


class BrokenRecordError(UserError):
    """A file that is no JSON at all: cut off, or never a record."""


# What a value of the JSON may be: each kind of field says so in words for the error, and tests it.

def _field(words, fits):
    return dataclasses.field(metadata={"words": words, "fits": fits})


def _is_number(value):
    return type(value) in (int, float) and abs(value) < 1e300  # neither bool nor NaN nor infinite


def _is_number_or_null(value):
    return value is None or _is_number(value)


def _is_count(value):
    return type(value) is int and 0 <= value < 2 ** 63


def _is_text(value):
    return isinstance(value, str)


def _is_list(fits):
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _is_object(fits):
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _is_interval(value):
    return value is None or (isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))
                             and value[0] <= value[1])


def _rate():
    return _field("a number from 0 up to, but not, 1", lambda value: _is_number(value) and 0 <= value < 1)


def _share():
    return _field("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)


def _count():
    return _field("a whole number, 0 or more", _is_count)


def _seconds():
    return _field("a number above 0", lambda value: _is_number(value) and value > 0)


def _text():
    return _field("text", _is_text)


def _file_name():
    return _field("a name of letters, digits, '_', '.' and '-'",
                  lambda value: _is_text(value) and re.fullmatch(r"\w[\w.-]*", value) is not None)


def _object(words, fits):
    return _field(f"an object of {words}", _is_object(fits))


@dataclass
class Point:
    """Everything measured at one rate. A metric is None where it was not finite."""

    rate: float = _rate()  # asked for
    sparsity: float = _share()  # reached: units_taken / units_total
    unit: str = _text()  # what the rate is a share of
    units_total: int = _count()
    units_asked: int = _count()
    units_taken: int = _count()
    parameters: int = _count()  # of the denoiser
    nonzero_parameters: int = _count()
    weight_bytes: int = _count()
    macs: int = _count()  # multiply-accumulates of a denoiser call, for one latent
    peak_bytes: int = _count()  # the denoiser's weights and the most that a call for one image holds besides
    denoiser_seconds: float = _seconds()  # of a call for a batch; its median and that of dense, timed in turn
    dense_denoiser_seconds: float = _seconds()
    image_seconds: float = _seconds()  # mean of all images, and of them with dense's calls in place of their own
    dense_image_seconds: float = _seconds()
    metrics: Dict[str, float | None] = _object("numbers or null", _is_number_or_null)
    # 95 %: of clip_score and lpips for the difference to dense, image by image; of others for the value itself
    intervals: Dict[str, List[float] | None] = _object("two ascending numbers or null", _is_interval)
    per_image: Dict[str, List[float | None]] = _object("lists of numbers or null", _is_list(_is_number_or_null))
    seconds: Dict[str, float] = _object("numbers", _is_number)  # wall time of the stages


@dataclass
class Record:
    """All points of one (model, dataset, method), with what produced them; points ascend by rate."""

    model: str = _text()
    dataset: str = _file_name()
    method: str = _file_name()
    samples: List[Dict[str, str]] = _field(
        "a list, not empty, of objects with an id and a caption",
        lambda value: value != [] and _is_list(_is_object(_is_text))(value)
        and all(set(sample) == {"id", "caption"} for sample in value))
    settings: Dict[str, Any] = _object("settings", lambda _: True)
    backbones: Dict[str, str] = _object("texts", _is_text)
    notes: Dict[str, Any] = _object("notes", lambda _: True)
    versions: Dict[str, str] = _object("texts", _is_text)
    dense: Point = _object("a point", lambda _: True)
    points: List[Point] = _field("a list of points", _is_list(lambda value: isinstance(value, dict)))


# The settings that figures and summaries show; a record may hold more.
SETTINGS = {
    "seed": ("a whole number", lambda value: type(value) is int),
    "seeds": ("a whole number, 1 to 1000", lambda value: _is_count(value) and 1 <= value <= 1000),
    "steps": ("a whole number, 0 or more", _is_count),
    "guidance_scale": ("a number", _is_number),
    "device": ("text", _is_text),
}


def read_record(path) -> Record:
    """The record in a JSON file. Raises a UserError that names the file and the field at fault."""
    try:
        return _parse(json.loads(Path(path).read_bytes(), parse_constant=_no_constant))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BrokenRecordError(f"{path} is not JSON: {error}") from None
    except RecursionError:
        raise BrokenRecordError(f"{path} is no record: it is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{path} is no record this program can read: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _no_constant(name):
    raise ValueError(f"{name} is not a number in JSON")


def _parse(data) -> Record:
    """A Record of the decoded JSON; ValueError names the field at fault."""
    if not isinstance(data, dict):
        raise ValueError("it must be an object")
    if data.get("synthetic"):
        raise ValueError("it is synthetic, an illustration and not a measurement")
    if "schema_version" not in data:
        raise ValueError("schema_version is missing")
    version = data["schema_version"]
    if version != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {version!r:.40}, expected {SCHEMA_VERSION}; "
                         "measure again, or draw it with the program that wrote it")
    record = _build(Record, {name: value for name, value in data.items() if name != "schema_version"}, "")
    for name, (words, fits) in SETTINGS.items():
        if name not in record.settings:
            raise ValueError(f"settings.{name} is missing")
        if not fits(record.settings[name]):
            raise ValueError(f"settings.{name} must be {words}")
    record.dense = _build(Point, record.dense, "dense.")
    record.points = [_build(Point, point, f"points[{i}].") for i, point in enumerate(record.points)]
    _check_together(record)
    return record


def _build(kind, data: dict, where: str):
    fields = {field.name: field.metadata for field in dataclasses.fields(kind)}
    for name, field in fields.items():
        if name not in data:
            raise ValueError(f"{where}{name} is missing")
        if not field["fits"](data[name]):
            raise ValueError(f"{where}{name} must be {field['words']}")
    for name in data:
        if name not in fields:
            raise ValueError(f"{where}{name:.40} is not a field of a record")
    return kind(**data)


def _check_together(record: Record) -> None:
    """What no field can tell alone."""
    if record.dense.rate != 0:
        raise ValueError("dense.rate must be 0")
    rates = [point.rate for point in record.points]
    for i in range(1, len(rates)):
        if rates[i] <= rates[i - 1]:
            raise ValueError(f"points[{i}].rate is {rates[i]} after {rates[i - 1]}; rates must ascend, none twice")
    points = {"dense": record.dense, **{f"points[{i}]": point for i, point in enumerate(record.points)}}
    for where, point in points.items():
        if set(point.metrics) != set(record.dense.metrics):
            raise ValueError(f"{where}.metrics must have the names of dense.metrics")
        for name, values in point.per_image.items():
            if len(values) != len(record.samples) * record.settings["seeds"]:
                raise ValueError(f"{where}.per_image.{name} has {len(values)} values for {len(record.samples)} samples "
                                 f"and {record.settings['seeds']} seeds")


def write_record(record: Record, path) -> None:
    """Write a record as JSON, whole or not at all. NaN and infinity become null."""
    data = {"schema_version": SCHEMA_VERSION, **_plain(dataclasses.asdict(record))}
    _parse(data)  # what is written can be read
    write_json(data, path)


def _plain(value):
    """Lists, dicts and Python numbers of `value`, with None for what is not finite."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # a numpy array or number
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(data, path) -> None:
    """Write JSON, whole or not at all; NaN and infinity are a ValueError."""
    text = _layout(data) + "\n"
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def _layout(value, indent: str = "") -> str:
    """JSON text in which whatever holds no list or object is one line, long lists of numbers too."""
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


def find_records(results_dir) -> List[Path]:
    """The records in a results folder, as record_path lays them out, sorted; other JSON is none."""
    if not Path(results_dir).is_dir():
        raise UserError(f"there is no folder {results_dir}; run a sweep first, or name one with --results_dir")
    try:
        return sorted(path for path in Path(results_dir).glob("*/*/*.json")
                      if path.is_file() and b'"schema_version"' in path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None


def folder_name(model: str) -> str:
    """A model's name as one safe path component: 'org/model' becomes 'org--model'."""
    name = re.sub(r"[^\w.-]", "_", re.sub(r"[/\\]+", "--", model), flags=re.ASCII).strip("-.")
    if not name:
        raise UserError(f"cannot name a results folder after the model {model!r}")
    return name


def record_path(results_dir, model: str, dataset: str, method: str, shard=None) -> Path:
    """Where the record of (model, dataset, method) lives, or the part (i, n) of it that is measured apart."""
    part = ".{}of{}".format(*shard) if shard else ""
    return Path(results_dir) / folder_name(model) / dataset / f"{method}{part}.json"


def merge(found: Dict[Path, Record]) -> Record:
    """The parts of one record that were measured apart, as one. Raises UserError where they cannot be.

    Dense and the settings are those of the first; what differs in the measuring, or a rate measured twice, is named.
    """
    (first, merged), *others = found.items()
    merged = dataclasses.replace(merged, points=list(merged.points))
    where = {point.rate: first for point in merged.points}
    for path, record in others:
        differences = protocol_differences(merged, record, continuing=True)
        if differences:
            raise UserError(f"{first} and {path} were measured differently: {'; '.join(differences)}")
        for point in record.points:
            if point.rate in where:
                raise UserError(f"{where[point.rate]} and {path} both hold rate {point.rate:g} of {record.method} on "
                                f"{record.model}; move one away, or name it with --results_file")
            where[point.rate] = path
            merged.points.append(point)
        if set(record.dense.metrics) != set(merged.dense.metrics):
            raise UserError(f"{first} and {path} hold different metrics; measure those that one lacks first")
    merged.points.sort(key=lambda point: point.rate)
    return merged


def protocol_differences(a: Record, b: Record, continuing: bool = False) -> List[str]:
    """How the measuring of two records differs, as 'steps: 20 and 30'; empty where they may share a figure.

    continuing: where b is to go on with a. The method and its options count then too, and which metrics does not.
    """
    pairs = {"model": (a.model, b.model), "dataset": (a.dataset, b.dataset)}
    if continuing:
        pairs["method"] = (a.method, b.method)
    left_out = {"metrics"} if continuing else {option for method in METHODS.values() for option in method.options}
    for part in ("settings", "backbones", "versions"):
        left, right = getattr(a, part), getattr(b, part)
        for name in {**left, **right}:
            if part == "settings" and name in left_out or part == "backbones" and continuing and not (
                    name in left and name in right):
                continue
            pairs[name if part == "settings" else f"{part}.{name}"] = (left.get(name), right.get(name))
    differences = [f"{name}: {_shown(left)} and {_shown(right)}"
                   for name, (left, right) in pairs.items() if left != right]
    if a.samples != b.samples:
        if len(a.samples) != len(b.samples):
            differences.append(f"samples: {len(a.samples)} and {len(b.samples)}")
        else:
            first = next((x, y) for x, y in zip(a.samples, b.samples) if x != y)
            differences.append("samples: {id} ({caption}) and ".format(**first[0])
                               + "{id} ({caption})".format(**first[1]))
    return differences


def _shown(value) -> str:
    return "none" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
