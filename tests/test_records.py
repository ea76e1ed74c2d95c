"""Records: a record that is read is valid, a record that is written can be read, and differences are named."""
import json
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from pruning import UserError, whole_file
from pruning.metrics.intervals import mean_interval
from pruning.records import store
from pruning.records.answers import answer
from pruning.records.record import (
    SCHEMA_VERSION,
    Notes,
    Point,
    Record,
    find_records,
    folder_name,
    protocol_differences,
    read_record,
    record_path,
    write_record,
)
from pruning.records.report import write_record_files
from pruning.records.summaries import summary

VERSION_3 = Path(__file__).parent / "data" / "version_3.json"  # bundled structured record, cut to 2 rates, 6 samples
EMPTY = "Captions skipped because they are empty"
BY_NORM = "structured+criterion=norm+refit=off"  # what the method did until version 5
QUIET = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def make_point(rate, images=3):
    taken = round(1000 * rate)
    return Point(
        rate=rate, sparsity=rate, unit="weights", units_total=1000, units_asked=taken, units_taken=taken,
        parameters=1100, nonzero_parameters=1100 - taken, weight_bytes=4400, denoiser_seconds=0.02,
        dense_denoiser_seconds=0.02, image_seconds=0.1, dense_image_seconds=0.1, macs=100, peak_bytes=5000,
        metrics={"clip_score": 80.0 - 60 * rate, "fid": 10 + 90 * rate},
        intervals={"clip_score": [-60 * rate - 1, 1.0], "fid": None},
        per_image={"clip_score": [80.0 - 60 * rate] * images},
        seconds={"prune": 0.1, "generate": 5.0, "measure": 0.5}, skipped_modules={"a.attn1": "its class is not known"},
        unreached={"its class is not known": 60}, inexact={"b": "its norm_q runs across all heads"},
        layer_rates={"a": rate, "b": 1.0}, layer_errors={"a": 0.25} if rate else {},
        layer_parameters={} if rate else {"a": 0.75, "b": 0.25}, layer_macs={} if rate else {"a": 0.5, "b": 0.5},
        floors={"fid": 1.5} if rate == 0 else {}, seed_spread={"clip_score": 0.8, "fid": None} if rate == 0 else {},
        file_bytes=2200, ratio_intervals={"denoiser_seconds": [0.9, 1.1]} if rate else {},
        compiled=None if rate == 0 else rate > 0.1)


def make_record(rates=(0.1, 0.2), images=3):
    return Record(
        model="shapes-unet", dataset="shapes", method="magnitude", options={"scope": "layer"},
        samples=[{"id": f"prompts-{i:05d}", "caption": f"a [red  cross] and {i}"} for i in range(images)],
        settings={"seed": 0, "seeds": 1, "steps": 20, "guidance_scale": 4.0, "device": "cpu",
                  "metrics": ["clip_score", "fid"]},
        backbones={"clip_score": "bundled shapes-clip", "fid": "bundled shapes-squeezenet"},
        notes=Notes(faults={EMPTY: {"count": 4, "first": ["line 2", "line 5", "line 8"]}}, code=["0123456789ab"],
                    reference_images=2048, feature_sizes={"features": 64}),
        versions={"python": "3.11.7", "torch": "2.15.0"},
        dense=make_point(0.0, images), points=[make_point(rate, images) for rate in rates])


def changed(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return path


@pytest.fixture
def written(tmp_path):
    write_record(make_record(), tmp_path / "magnitude.json")
    return tmp_path / "magnitude.json"


def test_a_record_survives_writing_and_reading(written):
    assert read_record(written) == make_record()


def test_what_is_not_finite_becomes_null_and_the_file_is_strict_json(tmp_path):
    record = make_record()
    record.points[0].metrics["fid"] = float("nan")
    record.points[1].metrics["clip_score"] = np.float32("inf")
    record.points[1].per_image["clip_score"] = np.array([1.0, np.nan, -np.inf])
    write_record(record, tmp_path / "r.json")

    def refuse(name):
        raise AssertionError(name)
    json.loads((tmp_path / "r.json").read_text(), parse_constant=refuse)
    read = read_record(tmp_path / "r.json")
    assert read.points[0].metrics["fid"] is None
    assert read.points[1].metrics["clip_score"] is None
    assert read.points[1].per_image["clip_score"] == [1.0, None, None]


def test_a_long_list_of_numbers_is_one_line_and_captions_keep_their_spaces(tmp_path):
    texts = {}
    for images in (3, 50):
        write_record(make_record(images=images), tmp_path / "r.json")
        texts[images] = (tmp_path / "r.json").read_text().splitlines()
    assert max(line.count("80.0") for line in texts[50]) == 50
    assert len(texts[50]) == len(texts[3]) + 47  # a line for each sample
    assert read_record(tmp_path / "r.json").samples[0]["caption"] == "a [red  cross] and 0"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(written):
    before = written.read_bytes()
    record = make_record()
    record.settings["steps"] = None
    with pytest.raises(ValueError, match="settings.steps"):
        write_record(record, written)
    with pytest.raises(ZeroDivisionError), whole_file(written) as part:
        1 / part.write_text("")
    assert written.read_bytes() == before
    assert list(written.parent.iterdir()) == [written]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file"):
        write_record(make_record(), tmp_path / "file" / "r.json")


BROKEN = {
    "schema_version is missing": lambda d: d.pop("schema_version"),
    "schema_version is 99, expected 3 to 11": lambda d: d.update(schema_version=99),
    "model is missing": lambda d: d.pop("model"),
    "model must be text": lambda d: d.update(model=3),
    "method must be a name": lambda d: d.update(method="../../etc"),
    "samples must be": lambda d: d.update(samples=[]),
    "settings.steps is missing": lambda d: d["settings"].pop("steps"),
    "settings.seed must be": lambda d: d["settings"].update(seed="0"),
    "dense must be": lambda d: d.update(dense=None),
    "options is missing": lambda d: d.pop("options"),
    "options must be an object of numbers, texts": lambda d: d["options"].update(scope=["layer"]),
    "options must be an object of .* named by": lambda d: d["options"].update({"../etc": 1}),
    "notes must be an object": lambda d: d.update(notes=[]),
    "notes.faults is missing": lambda d: d["notes"].pop("faults"),
    "notes.faults must be an object of counts": lambda d: d["notes"].update(faults={"Captions skipped": 3}),
    "notes.faults must be an object of .* the first names": lambda d: d["notes"].update(
        faults={"Captions skipped": {"count": 1, "first": [2]}}),
    "notes.code must be a list of texts": lambda d: d["notes"].update(code="0123456789ab"),
    "notes.reference_images must be a whole number": lambda d: d["notes"].update(reference_images=None),
    "notes.feature_sizes must be an object of whole": lambda d: d["notes"].update(feature_sizes={"features": "64"}),
    "notes.floors is not a field": lambda d: d["notes"].update(floors={}),
    "dense.floors must be an object of numbers or null": lambda d: d["dense"].update(floors={"fid": "1.5"}),
    "dense.seed_spread must be an object of numbers": lambda d: d["dense"].update(seed_spread={"fid": [1]}),
    "dense.skipped_modules must be an object of texts": lambda d: d["dense"].update(skipped_modules=["a.attn1"]),
    "dense.unreached must be an object of whole numbers": lambda d: d["dense"].update(unreached={"heads": 0.5}),
    r"points\[0\].inexact must be an object of texts": lambda d: d["points"][0].update(inexact=["a.attn1"]),
    r"points\[1\].layer_rates must be an object of numbers": lambda d: d["points"][1].update(layer_rates={"a": None}),
    r"points\[0\].layer_errors must be an object of num": lambda d: d["points"][0].update(layer_errors=[0.25]),
    "dense.layer_parameters must be an object of numbers": lambda d: d["dense"].update(layer_parameters={"a": "3"}),
    "dense.layer_macs must be an object of numbers": lambda d: d["dense"].update(layer_macs=1),
    r"points\[0\].file_bytes must be a whole number of 0 or more, or null":
        lambda d: d["points"][0].update(file_bytes=1.5),
    "dense.ratio_intervals must be an object of two":
        lambda d: d["dense"].update(ratio_intervals={"image_seconds": [2, 1]}),
    r"points\[0\].compiled must be true, false or null": lambda d: d["points"][0].update(compiled=1),
    "model must be text.*": lambda d: d.update(model="\ud800"),
    "dense.rate must be 0": lambda d: d["dense"].update(rate=0.1),
    r"points\[1\].rate is missing": lambda d: d["points"][1].pop("rate"),
    r"points\[1\].rate must be a number in \[0, 1\)": lambda d: d["points"][1].update(rate=1.0),
    r"points\[0\].rate must be a number in": lambda d: d["points"][0].update(rate=True),
    r"points\[1\].rate is 0.1 after 0.1": lambda d: d["points"][1].update(rate=0.1),
    r"points\[1\].rate is 0.05 after": lambda d: d["points"][1].update(rate=0.05),
    r"points\[0\].parameters must be a whole number of 0 or more": lambda d: d["points"][0].update(parameters=10 ** 30),
    r"points\[0\].metrics must be": lambda d: d["points"][0].update(metrics={"fid": "low"}),
    r"points\[0\].metrics must have": lambda d: d["points"][0].update(metrics={"fid": 1}),
    r"points\[0\].per_image.clip_score has 2": lambda d: d["points"][0]["per_image"]["clip_score"].pop(),
    r"points\[0\].colour is not a field": lambda d: d["points"][0].update(colour=1),
    "it is synthetic": lambda d: d.update(synthetic=True),
}


@pytest.mark.parametrize("words", BROKEN)
def test_each_fault_names_the_file_and_the_field(written, words):
    changed(written, BROKEN[words])
    with pytest.raises(UserError, match=words) as raised:
        read_record(written)
    assert str(written) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"null", b"\xff\xfe\x00", b"NaN", b"[" * 100_000,
                                     b'{"schema_version": 1' + b"0" * 5000 + b"}", b'{"schema_version": NaN}'])
def test_a_file_that_is_not_a_record_is_one_line(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match="x.json"):
        read_record(tmp_path / "x.json")


def test_a_missing_file_and_a_folder_are_one_line(tmp_path):
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(UserError, match="cannot read"):
            read_record(path)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                    max_leaves=6)


def places(value, path=()):
    """Every place in nested JSON, as the keys that lead to it."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


@pytest.mark.parametrize("version", [3, 4])
@QUIET
@given(data=st.data())
def test_anything_put_anywhere_into_a_record_is_refused_or_read_and_described_but_never_a_traceback(
        tmp_path, version, data):
    path = tmp_path / "r.json"
    write_record(make_record(), path)
    content = json.loads((path if version == 4 else VERSION_3).read_text())
    place = data.draw(st.sampled_from(sorted(places(content), key=str)))
    value = data.draw(JSON)
    if place:
        inner = content
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
    else:
        content = value
    path.write_text(json.dumps(content))
    with suppress(UserError):
        record = read_record(path)
        write_record(record, path)  # what was accepted is whole
        summary(record).encode("utf-8")


@QUIET
@given(content=st.binary(max_size=60))
def test_garbage_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError):
        read_record(tmp_path / "x.json")


def test_only_records_are_found(tmp_path):
    record = make_record()
    paths = [record_path(tmp_path, "org/b", "shapes", "magnitude"), record_path(tmp_path, "a", "coco", "magnitude")]
    for path in paths:
        write_record(record, path)
    folder = paths[1].parent
    (folder / "synthetic.json").write_text('{"synthetic": true}')
    (folder / "other.json").write_text("{}")
    (folder / "half.json").write_text(f'{{"schema_version": {SCHEMA_VERSION}, "mod')
    write_record(record, record_path(tmp_path / "single_rate", "a", "coco", "magnitude"))  # a results folder of its own
    assert find_records(tmp_path) == sorted([*paths, folder / "half.json"])  # a torn record is not passed over
    with pytest.raises(UserError, match="no folder"):
        find_records(tmp_path / "none")


@pytest.mark.parametrize(("model", "folder"), [
    ("shapes-unet", "shapes-unet"),
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "stable-diffusion-v1-5--stable-diffusion-v1-5"),
    ("../my models/sd 1", "my_models--sd_1"),
    ("/home/me/sd/", "home--me--sd"),
    ("C:\\sd", "C_--sd"),
])
def test_a_model_is_one_safe_folder(model, folder):
    assert folder_name(model) == folder


@pytest.mark.parametrize("model", ["", "..", "/", "./."])
def test_a_model_without_a_name_is_refused(model):
    with pytest.raises(UserError):
        folder_name(model)


def test_equal_protocols_have_no_differences():
    assert protocol_differences(make_record(), make_record(rates=(0.5,)), continuing=True) == []


@pytest.mark.parametrize(("change", "words"), [
    (lambda r: setattr(r, "model", "other"), "model: shapes-unet and other"),
    (lambda r: setattr(r, "dataset", "coco"), "dataset: shapes and coco"),
    (lambda r: r.settings.update(steps=30), "steps: 20 and 30"),
    (lambda r: r.settings.update(threads=2), "threads: none and 2"),
    (lambda r: r.settings.update(metrics=["fid"]), "metrics: clip_score, fid and fid"),
    (lambda r: r.backbones.update(fid="standard"), "backbones.fid: bundled shapes-squeezenet and standard"),
    (lambda r: r.versions.update(torch="2.4.1"), "versions.torch: 2.15.0 and 2.4.1"),
    (lambda r: r.samples.pop(), "samples: 3 and 2"),
    (lambda r: r.samples[1].update(id="x"), "samples: prompts-00001 (a [red  cross] and 1) and x"),
])
def test_a_difference_is_named(change, words):
    other = make_record()
    change(other)
    assert [d[:len(words)] for d in protocol_differences(make_record(), other)] == [words]


def test_the_method_and_its_options_count_only_if_one_record_continues_the_other():
    other = make_record()
    other.method, other.options = "iterative", {"scope": "global", "recovery_steps": 60}
    assert protocol_differences(make_record(), other) == []
    assert protocol_differences(make_record(), other, continuing=True) == ["method: magnitude and iterative"]
    other.method = "magnitude"
    assert protocol_differences(make_record(), other, continuing=True) == [
        "scope: layer and global", "recovery_steps: 0 and 60"]


def test_an_option_that_a_method_did_not_have_yet_had_its_default():
    earlier, present = make_record(), make_record()
    earlier.options = {"scope": "layer"}
    present.options = {"scope": "layer", "pattern": None, "refit": False, "allocation": "uniform"}
    assert protocol_differences(earlier, present, continuing=True) == []
    present.options["refit"] = True
    assert protocol_differences(earlier, present, continuing=True) == ["refit: False and True"]


def test_real_images_must_be_the_same_if_both_records_compare_with_real_images():
    one, other, without = make_record(), make_record(), make_record()
    one.settings["reference_originals"], other.settings["reference_originals"] = "0123", "4567"
    for continuing in (True, False):
        assert protocol_differences(one, other, continuing) == ["reference_originals: 0123 and 4567"]
    assert protocol_differences(one, without, continuing=True) == []  # the other has no metric that compares with them


def test_metrics_may_differ_only_if_one_record_continues_the_other():
    other = make_record()
    other.settings["metrics"] = ["fid"]
    del other.backbones["clip_score"]
    assert len(protocol_differences(make_record(), other)) == 2
    assert protocol_differences(make_record(), other, continuing=True) == []
    other.backbones["fid"] = "standard"
    assert len(protocol_differences(make_record(), other, continuing=True)) == 1


def test_a_record_is_named_by_the_options_that_differ_from_the_defaults():
    record = make_record()
    assert record.variant == "magnitude"
    record.options["scope"] = "global"
    assert record.variant == "magnitude+scope=global"
    assert record_path("r", "m", "d", record.variant, (1, 2)).name == "magnitude+scope=global.1of2.json"


# ---- earlier versions

def earlier_record(path, version):
    """The JSON of a record of version 4 to 8, as far as versions 8 and 9 differ."""
    write_record(make_record(), path)
    data = json.loads(path.read_text())
    del data["notes"]["faults"]
    for point in (data["dense"], *data["points"]):
        del point["file_bytes"], point["ratio_intervals"]
    data["notes"].update(captions_skipped=4, captions_truncated=1)
    return {**data, "schema_version": version}


def test_a_version_8_record_tells_how_many_captions_were_skipped_but_not_which(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(earlier_record(tmp_path / "r.json", 8)))
    record = read_record(tmp_path / "r.json")
    assert "Captions skipped: 4. Captions cut where CLIP stops reading: 1." in " ".join(summary(record).split())
    assert record.settings["reference_originals"] == record.settings["other_originals"] == "unknown"
    assert protocol_differences(record, read_record(tmp_path / "r.json"), continuing=True) == []
    present = make_record()
    present.settings.update(reference_originals="0123", other_originals="4567")
    assert protocol_differences(record, present, continuing=True) == [
        "reference_originals: unknown and 0123", "other_originals: unknown and 4567"]


def test_intervals_of_earlier_versions_are_computed_again_from_the_values_of_the_images(tmp_path):
    data, record = json.loads(VERSION_3.read_text()), read_record(VERSION_3)
    own, dense = (np.array(point["per_image"]["clip_score"]) for point in (data["points"][0], data["dense"]))
    assert record.points[0].intervals["clip_score"] == list(mean_interval(own - dense))
    assert record.points[0].intervals["clip_score"] != data["points"][0]["intervals"]["clip_score"]
    assert record.points[0].intervals["kid"] == data["points"][0]["intervals"]["kid"]  # of sets of images
    assert data["points"][0]["intervals"]["lpips_dense"] is not None
    assert all(point.intervals["lpips_dense"][0] >= 0 for point in record.points)
    write_record(record, tmp_path / "r.json")
    record.points[0].intervals["clip_score"] = [-1.0, 1.0]  # what this version wrote stays
    write_record(record, tmp_path / "r.json")
    assert read_record(tmp_path / "r.json") == record


def test_a_version_4_record_is_read_and_says_nothing_of_layers(tmp_path):
    data = earlier_record(tmp_path / "r.json", 4)
    for point in (data["dense"], *data["points"]):
        for name in ("layer_rates", "layer_errors", "layer_parameters", "layer_macs"):
            del point[name]
    (tmp_path / "r.json").write_text(json.dumps(data))
    record = read_record(tmp_path / "r.json")
    assert record.points[0].layer_rates == record.dense.layer_macs == {}
    assert [point.metrics for point in record.points] == [point.metrics for point in make_record().points]


@pytest.mark.parametrize(("dtype", "name"), [("float32", "structured"), ("bfloat16", "structured+round_to=1")])
def test_widths_of_a_version_6_record_were_not_rounded(tmp_path, dtype, name):
    data = earlier_record(tmp_path / "r.json", 6)
    data.update(method="structured", options={"round_to": 1})
    data["settings"]["dtype"] = dtype
    (tmp_path / "r.json").write_text(json.dumps(data))
    assert read_record(tmp_path / "r.json").variant == name


@pytest.mark.parametrize("method", ["structured", "attention_heads", "magnitude"])
def test_units_of_a_version_5_record_went_by_norm_without_refit(tmp_path, method):
    data = earlier_record(tmp_path / "r.json", 5)
    data.update(method=method, options={"mask_only": False} if method != "magnitude" else {})
    (tmp_path / "r.json").write_text(json.dumps(data))
    by_norm = "" if method == "magnitude" else "+criterion=norm+refit=off"
    assert read_record(tmp_path / "r.json").variant == method + by_norm


def test_a_version_3_record_is_read_with_the_values_it_has(tmp_path):
    data, record = json.loads(VERSION_3.read_text()), read_record(VERSION_3)
    assert data["schema_version"] == 3
    assert (record.method, record.variant) == ("structured", BY_NORM)
    assert record.options == {"criterion": "norm", "refit": False, "mask_only": False, "round_to": 0}
    assert record.settings == {**{k: v for k, v in data["settings"].items() if k not in ("mask_only", "round_to")},
                               "reference_originals": "unknown", "other_originals": "unknown"}
    assert record.notes == Notes({}, ["1716ea7f4f56"], 2048, {"features": 64})
    assert record.dense.floors == data["notes"]["floors"] != {}
    assert record.samples == data["samples"]
    assert [point.rate for point in record.points] == [0.2, 0.8]
    for point, original in zip((record.dense, *record.points), (data["dense"], *data["points"])):
        assert {name: getattr(point, name) for name in original if name != "intervals"} == {
            name: value for name, value in original.items() if name != "intervals"}
        assert (point.file_bytes, point.ratio_intervals) == (None, {})
        assert (point.skipped_modules, point.seed_spread, point.compiled) == ({}, {}, None)
        assert (point.layer_rates, point.layer_errors, point.layer_parameters, point.layer_macs) == ({}, {}, {}, {})
    write_record(record, tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["schema_version"] == SCHEMA_VERSION
    assert read_record(tmp_path / "r.json") == record


def test_a_version_3_record_is_drawn_as_before(tmp_path):
    record = read_record(VERSION_3)
    written = write_record_files(record, tmp_path, tmp_path / "images")
    assert sorted(path.name for path in written) == [
        f"{BY_NORM}.png", f"{BY_NORM}.txt", f"{BY_NORM}_cost.png", f"{BY_NORM}_metrics.png"]
    text = " ".join((tmp_path / f"{BY_NORM}.txt").read_text(encoding="utf-8").split())
    assert answer(record, 0.05).startswith(
        f"How far? {BY_NORM} pruning of shapes-unet stays within 5 % of dense by clip_score up to rate 0.2, which has "
        "99.6 % of dense (95 % interval 97.6 to 102.2; no image loses over 5 %)")
    assert "0.2 0.200 92.85 −1.9/+2.5 −31.61 ± 70 0.3271 ± 0.39 1.102 0.1468 −0.041/+0.083" in text
    assert "skipped" not in text
    assert "It compares 6 images with 2,048 reference images by 64 features; as many real images score 1.23" in text


def test_notes_of_version_3_go_to_the_points_they_are_about(tmp_path):
    def change(data):
        data["notes"].update(left_out={"a.attn1": "its class is not known"}, seed_spread={"clip_score": 0.8})
        data["settings"].update(round_to=8)
        for name in ("captions_truncated", "code", "reference_images", "fid_feature_size"):
            del data["notes"][name]
    path = tmp_path / "structured.json"
    path.write_bytes(VERSION_3.read_bytes())
    record = read_record(changed(path, change))
    assert record.variant == f"{BY_NORM}+round_to=8"
    assert record.notes == Notes({}, [], 0, {})
    assert [point.skipped_modules for point in (record.dense, *record.points)] == 3 * [
        {"a.attn1": "its class is not known"}]
    assert [point.seed_spread for point in (record.dense, *record.points)] == [{"clip_score": 0.8}, {}, {}]
    assert [bool(point.floors) for point in (record.dense, *record.points)] == [True, False, False]


@pytest.mark.parametrize(("words", "change"), [
    ("notes is missing", lambda d: d.pop("notes")),
    ("notes.floors must be an object of numbers or null", lambda d: d["notes"].update(floors=[1])),
    ("notes.seed_spread must be", lambda d: d["notes"].update(seed_spread={"clip_score": "much"})),
    ("notes.left_out must be an object of texts", lambda d: d["notes"].update(left_out={"a": 1})),
    ("notes.fid_feature_size must be a whole number", lambda d: d["notes"].update(fid_feature_size="64")),
    ("notes.code must be a list of texts", lambda d: d["notes"].update(code=[1])),
    ("notes.mood is not a field", lambda d: d["notes"].update(mood="good")),
    ("points must be", lambda d: d.update(points=[1])),
    ("method must be a name", lambda d: d.update(method=["structured"])),
    ("settings.seed is missing", lambda d: d["settings"].pop("seed")),
])
def test_a_fault_in_a_version_3_record_names_the_field(tmp_path, words, change):
    path = tmp_path / "structured.json"
    path.write_bytes(VERSION_3.read_bytes())
    with pytest.raises(UserError, match=words):
        read_record(changed(path, change))


# ---- files beside a record

MADE = store.Made(np.random.RandomState(0).randint(0, 256, (8, 8, 3)).astype(np.uint8), True, 0.1, 40)


def test_rates_that_differ_in_any_digit_have_different_folders():
    rates = [0.0, 0.3, 0.30001, 0.1 + 0.2, 1e-9]
    assert len({store.rate_folder(rate) for rate in rates}) == len(rates)
    assert [store.rate_folder(rate) for rate in (0.0, 0, 0.3, np.float64(0.3))] == ["dense", "dense", "0.3", "0.3"]
    assert store.image_file("images", "magnitude", 0.3, 7) == Path("images/magnitude/0.3/0007.png")


def test_an_image_comes_back_with_all_that_was_saved(tmp_path):
    for made in (MADE, MADE._replace(finite=False, seconds=1 / 3, calls=1)):
        store.save_image(made, tmp_path / "a" / "0.png", "abc")
        loaded = store.load_image(tmp_path / "a" / "0.png", "abc")
        assert np.array_equal(loaded.pixels, made.pixels)
        assert loaded[1:] == made[1:]


def test_an_image_of_another_provenance_or_without_its_calls_counts_as_not_there(tmp_path):
    path = tmp_path / "0.png"
    assert store.load_image(path, "abc") is None
    store.save_image(MADE, path, "abc")
    assert store.load_image(path, "abd") is None
    text = PngImagePlugin.PngInfo()
    for name, value in (("provenance", "abc"), ("finite", "1"), ("seconds", "0.1")):
        text.add_text(name, value)
    Image.fromarray(MADE.pixels).save(path, pnginfo=text)
    assert store.load_image(path, "abc") is None
    assert path.exists()


@pytest.mark.parametrize("damage", [lambda data: data[:60], lambda data: b"",
                                    lambda data: data.replace(b"0.1", b"nan")])
def test_a_broken_image_is_renamed_with_a_message(tmp_path, capfd, damage):
    path = tmp_path / "0.png"
    store.save_image(MADE, path, "abc")
    broken = damage(path.read_bytes())
    path.write_bytes(broken)
    assert store.load_image(path, "abc") is None
    assert (tmp_path / "0.png.broken").read_bytes() == broken
    assert "renamed to 0.png.broken" in "".join(capfd.readouterr())


def test_features_are_computed_once_for_a_key_and_the_content_of_images(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path))
    images, computed = np.random.RandomState(0).randint(0, 256, (4, 8, 8, 3)).astype(np.uint8), []

    def count(images, key):
        found = store.cached_features(lambda x: computed.append(key) or x.mean(axis=(1, 2)), images, key)
        assert np.array_equal(found, images.mean(axis=(1, 2)))
        return len(computed)

    assert [count(images, "a"), count(images, "a"), count(images, "b")] == [1, 1, 2]
    other = images.copy()
    other[0, 0, 0, 0] ^= 1
    assert count(other, "a") == 3
    assert count(images.reshape(4, 4, 16, 3), "a") == 4
    for file in tmp_path.rglob("*.npz"):
        file.write_bytes(file.read_bytes()[:-5])
    assert [count(images, "a"), count(images, "a")] == [5, 5]
    monkeypatch.setenv("PRUNING_CACHE", str(next(tmp_path.rglob("*.npz"))))  # no folder can be made there
    assert [count(images, "a"), count(images, "a")] == [6, 7]


def test_one_writer_removes_its_own_half_written_files_and_no_others(tmp_path):
    """Another variant's record may be written at the same time."""
    own = [".magnitude.json.0a.part", ".magnitude.png.0a.part", ".magnitude_metrics.png.0a.part",
           ".report.html.0a.part"]
    others = [".magnitude+scope=global.json.0a.part", ".magnitude+scope=global.png.0a.part",
              ".magnitude.1of2.json.0a.part"]
    images = tmp_path / "images"
    for folder in ("magnitude", "magnitude+scope=global"):
        (images / folder / "0.3").mkdir(parents=True)
        (images / folder / "0.3" / ".0000.png.0a.part").write_text("")
    for name in (*own, *others):
        (tmp_path / name).write_text("")
    with store.only_writer(tmp_path / "magnitude.json"):
        assert sorted(path.name for path in tmp_path.glob(".*.part")) == sorted(others)
        assert [path.parts[-3] for path in images.rglob("*.part")] == ["magnitude+scope=global"]


def test_a_second_writer_of_one_record_is_refused_and_of_another_variant_is_not(tmp_path):
    path, refused = tmp_path / "magnitude.json", []

    def second():
        try:
            with store.only_writer(path):
                pass
        except UserError as error:
            refused.append(str(error))
    with store.only_writer(path), store.only_writer(tmp_path / "magnitude+scope=global.json"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert "another process is writing" in refused[0]
    second()
    assert len(refused) == 1
    assert list(tmp_path.iterdir()) == []
