"""The record: what is read is valid, what is written can be read, and records of other settings are told apart."""
import json
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pruning import UserError, whole_file
from pruning.records.record import (
    SCHEMA_VERSION,
    Point,
    Record,
    find_records,
    folder_name,
    protocol_differences,
    read_record,
    record_path,
    write_record,
)

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
        seconds={"prune": 0.1, "generate": 5.0, "measure": 0.5})


def make_record(rates=(0.1, 0.2), images=3):
    return Record(
        model="shapes-unet", dataset="shapes", method="magnitude",
        samples=[{"id": f"prompts-{i:05d}", "caption": f"a [red  cross] and {i}"} for i in range(images)],
        settings={"seed": 0, "seeds": 1, "steps": 20, "guidance_scale": 4.0, "device": "cpu",
                  "metrics": ["clip_score", "fid"], "scope": "layer"},
        backbones={"clip_score": "bundled shapes-clip", "fid": "bundled shapes-squeezenet"},
        notes={"reference_images": 2048}, versions={"python": "3.11.7", "torch": "2.15.0"},
        dense=make_point(0.0, images), points=[make_point(rate, images) for rate in rates])


@pytest.fixture
def written(tmp_path):
    write_record(make_record(), tmp_path / "magnitude.json")
    return tmp_path / "magnitude.json"


def changed(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return path


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
    record = make_record(images=50)
    write_record(record, tmp_path / "r.json")
    text = (tmp_path / "r.json").read_text()
    assert max(line.count("80.0") for line in text.splitlines()) == 50
    assert len(text.splitlines()) < 170
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
    "schema_version is 99": lambda d: d.update(schema_version=99),
    "model is missing": lambda d: d.pop("model"),
    "model must be text": lambda d: d.update(model=3),
    "method must be a name": lambda d: d.update(method="../../etc"),
    "samples must be": lambda d: d.update(samples=[]),
    "settings.steps is missing": lambda d: d["settings"].pop("steps"),
    "settings.seed must be": lambda d: d["settings"].update(seed="0"),
    "dense must be": lambda d: d.update(dense=None),
    "dense.rate must be 0": lambda d: d["dense"].update(rate=0.1),
    r"points\[1\].rate is missing": lambda d: d["points"][1].pop("rate"),
    r"points\[1\].rate must be a number": lambda d: d["points"][1].update(rate=1.0),
    r"points\[0\].rate must be a number from": lambda d: d["points"][0].update(rate=True),
    r"points\[1\].rate is 0.1 after 0.1": lambda d: d["points"][1].update(rate=0.1),
    r"points\[1\].rate is 0.05 after": lambda d: d["points"][1].update(rate=0.05),
    r"points\[0\].parameters must be a whole": lambda d: d["points"][0].update(parameters=10 ** 30),
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
def test_a_file_that_is_no_record_is_one_line(tmp_path, content):
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


@QUIET
@given(data=st.data())
def test_anything_put_anywhere_into_a_record_is_refused_or_read_but_never_a_traceback(tmp_path, data):
    path = tmp_path / "r.json"
    write_record(make_record(), path)
    content = json.loads(path.read_text())
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
        write_record(read_record(path), path)  # what was accepted is whole


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


def test_the_method_and_its_options_count_only_when_asked():
    other = make_record()
    other.method, other.settings["scope"] = "iterative", "global"
    assert protocol_differences(make_record(), other) == []
    assert protocol_differences(make_record(), other, continuing=True) == [
        "method: magnitude and iterative", "scope: layer and global"]
