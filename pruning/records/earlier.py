"""Records of earlier versions, read as version 11. No torch."""
from __future__ import annotations

import copy

from pruning import methods
from pruning.metrics import METRICS
from pruning.metrics.intervals import metric_interval
from pruning.records.schema import (
    COUNT,
    NAMED_TEXTS,
    NUMBERS_OR_NULL,
    OBJECT,
    POINTS,
    REAL_IMAGES,
    TEXTS,
    Record,
    check,
)

# How images were drawn, which earlier versions did in one way.
DRAWN = {"drawing": {}}
# What a method could not reach, which earlier versions did not say.
REACH = {"unreached": {}, "inexact": {}}
# What became of each layer, which earlier versions did not say.
LAYERS = {"layer_rates": {}, "layer_errors": {}, "layer_parameters": {}, "layer_macs": {}}

NOTES = {  # of version 3: name -> its kind, and the value of a note that is absent
    "captions_skipped": (COUNT, 0),
    "captions_truncated": (COUNT, 0),
    "code": (TEXTS, []),
    "reference_images": (COUNT, 0),
    "fid_feature_size": (COUNT, 0),
    "left_out": (NAMED_TEXTS, {}),
    "floors": (NUMBERS_OR_NULL, {}),
    "seed_spread": (NUMBERS_OR_NULL, {}),
}

COUNTED = {  # notes until version 8, which named no caption
    "captions_skipped": "Captions skipped",
    "captions_truncated": "Captions cut where CLIP stops reading",
}


def from_version_10(data: dict) -> dict:
    """Return a version 10 object as a version 11 object. Raises ValueError that names a part that version 10 has not.

    Until version 10, there were no baselines.
    """
    check(data, {"dense": OBJECT, "points": POINTS}, "")
    return {**data, "dense": {**DRAWN, **data["dense"]}, "points": [{**DRAWN, **point} for point in data["points"]]}


def from_version_9(data: dict) -> dict:
    """Return a version 9 object as a version 11 object. Raises ValueError that names a part that version 9 has not."""
    check(data, {"dense": OBJECT, "points": POINTS}, "")
    return from_version_10({**data, "dense": {**REACH, **data["dense"]},
                            "points": [{**REACH, **point} for point in data["points"]]})


def from_version_8(data: dict) -> dict:
    """Return a version 8 object as a version 11 object. Raises ValueError that names a part that version 8 has not.

    Until version 8, a record counted captions that were skipped or cut but named none, and it had no hash of the real
    images that it compared with. It did not say how large a saved file would be, nor how much ratios of times vary.
    """
    check(data, {"notes": OBJECT, "settings": OBJECT, "dense": OBJECT, "points": POINTS}, "")
    check(data["notes"], {name: COUNT for name in (*COUNTED, "reference_images")}, "notes.")
    notes = dict(data["notes"])
    counts = {what: notes.pop(name) for name, what in COUNTED.items()}
    faults = {what: {"count": count, "first": []} for what, count in counts.items() if count}
    unknown = dict.fromkeys(REAL_IMAGES, "unknown") if notes["reference_images"] else {}
    unmeasured = {"file_bytes": None, "ratio_intervals": {}}
    return from_version_9({
        **data, "settings": {**data["settings"], **unknown}, "notes": {**notes, "faults": faults},
        "dense": {**unmeasured, **data["dense"]}, "points": [{**unmeasured, **point} for point in data["points"]]})


def from_version_7(data: dict) -> dict:
    """Return a version 7 object as a version 11 object. Raises ValueError that names a part that version 7 has not.

    Until version 7, a record did not say which rates were asked for.
    """
    check(data, {"notes": OBJECT}, "")
    return from_version_8({**data, "notes": {"rates": [], **data["notes"]}})


def from_version_6(data: dict) -> dict:
    """Return a version 6 object as a version 11 object. Raises ValueError that names a part that version 6 has not.

    Until version 6, widths were not rounded by default, which in float32 they are not today either.
    """
    check(data, {"options": OBJECT, "settings": OBJECT}, "")
    same = data["options"].get("round_to") == 1 and data["settings"].get("dtype") == "float32"
    return from_version_7({**data, "options": {**data["options"], "round_to": 0}} if same else data)


def from_version_5(data: dict) -> dict:
    """Return a version 5 object as a version 11 object. Raises ValueError that names a part that version 5 has not.

    Until version 5, units went by norm and nothing was re-fitted.
    """
    check(data, {"options": OBJECT}, "")
    by_norm = {"criterion": "norm", "refit": False} if data.get("method") in ("structured", "attention_heads") else {}
    return from_version_6({**data, "options": {**by_norm, **data["options"]}})


def from_version_4(data: dict) -> dict:
    """Return a version 4 object as a version 11 object. Raises ValueError that names a part that version 4 has not."""
    check(data, {"dense": OBJECT, "points": POINTS}, "")
    return from_version_5({**data, "dense": {**LAYERS, **data["dense"]},
                           "points": [{**LAYERS, **point} for point in data["points"]]})


def from_version_3(data: dict) -> dict:
    """Return a version 3 object as a version 11 object. Raises ValueError that names a part that version 3 has not.

    Version 3 kept a method's options in settings, and skipped modules, floors and the spread of seeds in notes.
    """
    check(data, {"settings": OBJECT, "notes": OBJECT, "dense": OBJECT, "points": POINTS}, "")
    method, settings = data.get("method"), data["settings"]
    known = methods.METHODS[method].options if isinstance(method, str) and method in methods.METHODS else {}
    notes = copy.deepcopy({**{name: default for name, (_, default) in NOTES.items()}, **data["notes"]})
    check(notes, {name: kind for name, (kind, _) in NOTES.items()}, "notes.")
    feature_size = notes.pop("fid_feature_size")
    # Version 3 did not say whether torch.compile fell back.
    added = {**LAYERS, "skipped_modules": notes.pop("left_out"), "floors": {}, "seed_spread": {}, "compiled": None}
    of_dense = {"floors": notes.pop("floors"), "seed_spread": notes.pop("seed_spread")}
    return from_version_5({
        **data,
        "options": {name: settings[name] for name in known if name in settings},
        "settings": {name: value for name, value in settings.items() if name not in known},
        "notes": {**notes, "feature_sizes": {"features": feature_size} if feature_size else {}},
        "dense": {**data["dense"], **added, **of_dense},
        "points": [{**point, **added} for point in data["points"]],
    })


def renew_intervals(record: Record) -> None:
    """Compute the intervals of a record of an earlier version from its values of the images, as they are today.

    Until version 8, one outlier moved an interval without bound, and an interval could leave the bounds of its metric.
    Distances between sets of images have no values of images and keep their intervals.
    """
    for point in (record.dense, *record.points):
        for name in set(point.per_image) & set(record.dense.per_image) & set(METRICS):
            found = metric_interval(METRICS[name], point.per_image[name], record.dense.per_image[name],
                                    record.settings["seeds"])
            point.intervals[name] = found and list(found)
