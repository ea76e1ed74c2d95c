"""The fields of a record, and what each field may hold. No torch."""
from __future__ import annotations

import dataclasses
import re
from dataclasses import MISSING, dataclass
from typing import Any, Callable, Dict, List, NamedTuple

from pruning import methods


class Kind(NamedTuple):
    """A kind of JSON value, in words for error texts, and the test for it."""

    words: str
    fits: Callable[[Any], bool]


def _is_number(value):
    return type(value) in (int, float) and abs(value) < 1e300  # neither bool nor NaN nor infinite


def _is_whole(value):
    return type(value) is int and abs(value) < 2 ** 63


def _is_text(value):
    return isinstance(value, str) and re.search("[\ud800-\udfff]", value) is None  # no surrogate: files are UTF-8


def _is_list(fits):
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _is_object(fits):
    return lambda value: isinstance(value, dict) and all(map(_is_text, value)) and all(map(fits, value.values()))


def _is_interval(value):
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)) and value[0] <= value[1]


def _is_options(value):
    return (_is_object(lambda item: item is None or isinstance(item, bool) or _is_number(item) or _is_text(item))(value)
            and all(re.fullmatch(r"\w+", name) for name in value))


def _is_faults(value):
    return _is_object(lambda fault: isinstance(fault, dict) and set(fault) == {"count", "first"}
                      and COUNT.fits(fault["count"]) and TEXTS.fits(fault["first"]))(value)


def _is_samples(value):
    return (value != [] and _is_list(_is_object(_is_text))(value)
            and all(set(sample) == {"id", "caption"} for sample in value))


def _or_null(fits):
    return lambda value: value is None or fits(value)


NUMBER = Kind("a number", _is_number)
RATE = Kind("a number in [0, 1)", lambda value: _is_number(value) and 0 <= value < 1)
SHARE = Kind("a number in [0, 1]", lambda value: _is_number(value) and 0 <= value <= 1)
SECONDS = Kind("a number above 0", lambda value: _is_number(value) and value > 0)
COUNT = Kind("a whole number of 0 or more", lambda value: _is_whole(value) and value >= 0)
COUNT_OR_NULL = Kind("a whole number of 0 or more, or null", _or_null(COUNT.fits))
RATES = Kind("a list of numbers in [0, 1)", _is_list(RATE.fits))
TEXT = Kind("text", _is_text)
TEXTS = Kind("a list of texts", _is_list(_is_text))
FILE_NAME = Kind("a name of letters, digits, '_', '.' and '-'",
                 lambda value: _is_text(value) and re.fullmatch(r"\w[\w.-]*", value) is not None)
BOOL_OR_NULL = Kind("true, false or null", _or_null(lambda value: isinstance(value, bool)))
OBJECT = Kind("an object", _is_object(lambda _: True))
NUMBERS = Kind("an object of numbers", _is_object(_is_number))
COUNTS = Kind("an object of whole numbers of 0 or more", _is_object(COUNT.fits))
NUMBERS_OR_NULL = Kind("an object of numbers or null", _is_object(_or_null(_is_number)))
NAMED_TEXTS = Kind("an object of texts", _is_object(_is_text))
INTERVALS = Kind("an object of two ascending numbers or null", _is_object(_or_null(_is_interval)))
LISTS = Kind("an object of lists of numbers or null", _is_object(_is_list(_or_null(_is_number))))
OPTIONS = Kind("an object of numbers, texts, true, false or null, named by letters, digits and '_'", _is_options)
SAMPLES = Kind("a list, not empty, of objects with an id and a caption", _is_samples)
FAULTS = Kind("an object of counts and the first names", _is_faults)
DRAWING = Kind("an object of numbers and lists of numbers",
               _is_object(lambda item: _is_number(item) or _is_list(_is_number)(item)))
POINTS = Kind("a list of points", _is_list(lambda value: isinstance(value, dict)))


def field(kind: Kind, default=MISSING):
    """Return a dataclass field that holds a kind of value. default: a value, or a function that makes one."""
    given = {"default_factory": default} if callable(default) else {"default": default}
    return dataclasses.field(metadata={"kind": kind}, **given)


@dataclass
class Point:
    """Everything measured at one rate. A metric is None if its value was not finite."""

    rate: float = field(RATE)  # asked for
    sparsity: float = field(SHARE)  # reached: units_taken / units_total
    unit: str = field(TEXT)  # what the rate is a share of
    units_total: int = field(COUNT)
    units_asked: int = field(COUNT)
    units_taken: int = field(COUNT)
    parameters: int = field(COUNT)  # of the denoiser
    nonzero_parameters: int = field(COUNT)
    weight_bytes: int = field(COUNT)  # of the weights in memory
    macs: int = field(COUNT)  # multiply-accumulates of a denoiser call for one latent, of a baseline of a whole call
    peak_bytes: int = field(COUNT)  # the denoiser's weights and the most that a call for one image allocates
    # Time of a call for a batch: dense's times the median ratio of pairs. Of a baseline: that of all calls of a
    # drawing, divided by the number of dense's.
    denoiser_seconds: float = field(SECONDS)
    dense_denoiser_seconds: float = field(SECONDS)  # median time of dense, called in turn
    image_seconds: float = field(SECONDS)  # mean over all images
    dense_image_seconds: float = field(SECONDS)  # the same, recomputed with the dense call time
    metrics: Dict[str, float | None] = field(NUMBERS_OR_NULL)
    intervals: Dict[str, List[float] | None] = field(INTERVALS)  # 95 %, of what METRICS[name].interval says
    per_image: Dict[str, List[float | None]] = field(LISTS)
    seconds: Dict[str, float] = field(NUMBERS)  # wall time of each stage
    skipped_modules: Dict[str, str] = field(NAMED_TEXTS, dict)  # modules that the method cannot prune: name -> why
    unreached: Dict[str, int] = field(COUNTS, dict)  # parameters that the method cannot remove or zero: why -> how many
    inexact: Dict[str, str] = field(NAMED_TEXTS, dict)  # modules in which removing is not masking: name -> why
    floors: Dict[str, float | None] = field(NUMBERS_OR_NULL, dict)  # dense only: metric -> its value for real images
    seed_spread: Dict[str, float | None] = field(NUMBERS_OR_NULL, dict)  # dense only: what another seed changes
    layer_rates: Dict[str, float] = field(NUMBERS, dict)  # share that each layer or group of units lost
    layer_errors: Dict[str, float] = field(NUMBERS, dict)  # relative squared error of each layer's output, if measured
    layer_parameters: Dict[str, float] = field(NUMBERS, dict)  # dense only: each layer's share of the parameters
    layer_macs: Dict[str, float] = field(NUMBERS, dict)  # dense only: each layer's share of the multiply-accumulates
    file_bytes: int | None = field(COUNT_OR_NULL, None)  # of the weights as a saved file holds them
    ratio_intervals: Dict[str, List[float] | None] = field(INTERVALS, dict)  # field of a time -> 95 %, ÷ dense
    compiled: bool | None = field(BOOL_OR_NULL, None)  # False: torch.compile fell back; None: not asked for
    # Baselines only: keyword arguments by which diffusers draws so, of the pipeline or, for cache, of MagCacheConfig.
    drawing: Dict[str, Any] = field(DRAWING, dict)


@dataclass
class Notes:
    """Facts about a record that decide none of its numbers."""

    faults: Dict[str, Dict[str, Any]] = field(FAULTS, dict)  # of the data: what was skipped -> how often, where
    code: List[str] = field(TEXTS, list)  # commits of this program that measured
    reference_images: int = field(COUNT, 0)  # real images that sets of images are compared with
    feature_sizes: Dict[str, int] = field(COUNTS, dict)  # family of backbones -> number of features
    rates: List[float] = field(RATES, list)  # that were asked for, of all shards, but for those that are out of reach


@dataclass
class Record:
    """All points of one (model, dataset, variant), and what produced them. Points ascend by rate."""

    model: str = field(TEXT)
    dataset: str = field(FILE_NAME)
    method: str = field(FILE_NAME)
    options: Dict[str, Any] = field(OPTIONS)  # of the method
    samples: List[Dict[str, str]] = field(SAMPLES)
    settings: Dict[str, Any] = field(OBJECT)
    backbones: Dict[str, str] = field(NAMED_TEXTS)  # metric -> the network behind it
    notes: Notes = field(OBJECT)
    versions: Dict[str, str] = field(NAMED_TEXTS)
    dense: Point = field(OBJECT)
    points: List[Point] = field(POINTS)

    @property
    def variant(self) -> str:
        """The method with the options that differ from its defaults; the record's files carry this name."""
        return methods.variant_name(self.method, self.options)


# The settings that figures and texts show. A record may hold more.
SETTINGS = {
    "seed": Kind("a whole number", _is_whole),
    "seeds": Kind("a whole number in [1, 1000]", lambda value: _is_whole(value) and 1 <= value <= 1000),
    "steps": COUNT,
    "guidance_scale": NUMBER,
    "device": TEXT,
}

# Hashes of sets of real images, which a record has if one of its metrics compares with such a set.
REAL_IMAGES = ("reference_originals", "other_originals")


def check(values: dict, kinds: Dict[str, Kind], prefix: str) -> None:
    """Check values by name. Raises ValueError that names the first one that is missing or of another kind."""
    for name, kind in kinds.items():
        if name not in values:
            raise ValueError(f"{prefix}{name} is missing")
        if not kind.fits(values[name]):
            raise ValueError(f"{prefix}{name} must be {kind.words}")


def build(cls, values: dict, prefix: str):
    """Make an object of a dataclass from checked values. Raises ValueError that names the field at fault."""
    kinds = {each.name: each.metadata["kind"] for each in dataclasses.fields(cls)}
    check(values, kinds, prefix)
    for name in values:
        if name not in kinds:
            raise ValueError(f"{prefix}{name:.40} is not a field of a record")
    return cls(**values)
