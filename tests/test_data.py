"""Data sets are read in their real layouts, samples are chosen by seed, files are fetched completely or not at all."""
from __future__ import annotations

import hashlib
import http.server
import io
import json
import logging
import threading
import zipfile
from functools import partial

import numpy as np
import pooch
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pruning import UserError, originals
from pruning.data import (
    DATASETS,
    Dataset,
    Sample,
    Source,
    coco,
    fetching,
    fit_image,
    load_originals,
    load_samples,
    open_rgb,
    other_samples,
    reference_samples,
    training_captions,
)
from pruning.data.faults import note, sentences
from pruning.shapes import scenes


def picture(number=0, width=24, height=16):
    return Image.new("RGB", (width, height), (10 * number % 256, 80, 160))


def jpeg(number=0):
    body = io.BytesIO()
    picture(number).save(body, "JPEG")
    return body.getvalue()


def coco_json(count=12):
    """Return images 1, 2, ... `count` with three captions each; the caption of lowest id is neither first nor last."""
    images = [{"id": n, "file_name": f"{n:012d}.jpg"} for n in range(1, count + 1)]
    second, third = ([{"id": k * 1000 + n, "image_id": n, "caption": f"other {n}"} for n in range(1, count + 1)]
                     for k in (1, 2))
    first = [{"id": n, "image_id": n, "caption": f" A  picture,\nnumber {n}. "} for n in range(1, count + 1)]
    return {"images": images, "annotations": third + first + second}


def coco_folder(folder, content=None, captions_at="annotations/captions_val2017.json"):
    content = content or coco_json()
    (folder / captions_at).parent.mkdir(parents=True, exist_ok=True)
    (folder / captions_at).write_text(json.dumps(content))
    (folder / "val2017").mkdir()
    for image in content["images"]:
        (folder / "val2017" / image["file_name"]).write_bytes(jpeg(image["id"]))
    return folder


TOKEN_LINES = "".join(f"{n}_ab.jpg#{k}\tA dog , number {n}{k} .\n" for n in range(6) for k in range(5))
CSV_LINES = "image,caption\n" + "".join(f'{n}_ab.jpg,"A dog , number {n}{k} ."\n' for n in range(6) for k in range(5))
FLICKR8K_LAYOUTS = {
    "token": ("Flickr8k.token.txt", "Flicker8k_Dataset", TOKEN_LINES),
    "token, other spelling": ("Flickr8k.token.txt", "Flickr8k_Dataset", TOKEN_LINES),
    "token in its folder": ("Flickr8k_text/Flickr8k.token.txt", "Flicker8k_Dataset", TOKEN_LINES),
    "kaggle": ("captions.txt", "Images", CSV_LINES),
    "kaggle, small letters": ("captions.txt", "images", CSV_LINES),
}


def flickr8k_folder(folder, layout="token", extra=""):
    captions_at, images, lines = FLICKR8K_LAYOUTS[layout]
    (folder / captions_at).parent.mkdir(parents=True, exist_ok=True)
    (folder / captions_at).write_text(lines + extra, encoding="utf-8")
    (folder / images).mkdir()
    for n in range(6):
        (folder / images / f"{n}_ab.jpg").write_bytes(jpeg(n))
    return folder


def ids(samples):
    return [sample.id for sample in samples]


# ---------------------------------------------------------------- the table and its entries

NUMBERS = [f"{n:03d}" for n in range(10)]


def read_numbers(data_dir):
    return Source([Sample(n, f"number {n}", partial(picture, int(n))) for n in NUMBERS])


def add_data_set(monkeypatch, read):
    monkeypatch.setitem(DATASETS, "numbers", Dataset("images of one colour", "shapes-unet", "bundled", read))


def test_a_new_data_set_is_one_entry_and_one_function(monkeypatch):
    add_data_set(monkeypatch, read_numbers)
    samples, faults = load_samples("numbers", 4, seed=5)
    assert len(set(ids(samples))) == 4
    assert faults == {}
    assert load_originals(samples, 8)[:, 0, 0, 0].tolist() == [10 * int(sample.id) for sample in samples]
    trained = training_captions("numbers", 6, 5, exclude=samples)
    assert sorted([*trained, *(sample.caption for sample in samples)]) == [f"number {n}" for n in NUMBERS]
    assert reference_samples("numbers", samples) == samples
    others, left_out = other_samples("numbers", samples, 5)
    assert left_out == {}
    assert len(set(ids([*samples, *others]))) == 8


def test_a_source_may_have_training_captions_and_a_reference_set_of_its_own(monkeypatch):
    asked = []

    def training(count, seed):
        asked.append((count, seed))
        return [f"number {n}" for n in ("003", "x", "y", "z")[:count]]

    def read(data_dir):
        samples = read_numbers(data_dir).samples
        return Source(samples[:5], training=training, reference=lambda: samples[5:])

    add_data_set(monkeypatch, read)
    samples, _ = load_samples("numbers", 5)
    assert training_captions("numbers", 3, 7) == ["number 003", "number x", "number y"]
    assert training_captions("numbers", 3, 7, exclude=samples) == ["number x", "number y", "number z"]
    assert asked == [(3, 7), (3 + 5, 7)]  # enough, whichever captions of the samples are among them
    assert ids(reference_samples("numbers", samples)) == NUMBERS[5:]
    assert other_samples("numbers", samples) == (samples, {})  # the reference set has none of them


def test_every_function_reads_the_data_folder_that_it_is_given(tmp_path, monkeypatch):
    read = []
    add_data_set(monkeypatch, lambda data_dir: read.append(data_dir) or read_numbers(data_dir))
    samples, _ = load_samples("numbers", 2, 0, str(tmp_path))
    training_captions("numbers", 2, 0, tmp_path, samples)
    reference_samples("numbers", samples, tmp_path)
    other_samples("numbers", samples, 0, tmp_path)
    assert read == 4 * [tmp_path]


# ---------------------------------------------------------------- choosing

def test_a_seed_chooses_the_same_samples_on_every_machine_and_release():
    samples, faults = load_samples("shapes", 5, seed=0)
    assert ids(samples) == ["prompts-00283", "prompts-00100", "prompts-00037", "prompts-00046", "prompts-00374"]
    assert faults == {}


def test_fewer_images_are_the_first_of_many_and_another_seed_gives_another_order(tmp_path):
    folder = coco_folder(tmp_path)
    many, few, other = (ids(load_samples("coco", n, seed, folder)[0]) for n, seed in ((12, 3), (5, 3), (12, 4)))
    assert few == many[:5]
    assert sorted(many) == sorted(other) == [f"{n:012d}.jpg" for n in range(1, 13)]
    assert many != other


def test_the_order_in_the_caption_file_does_not_matter(tmp_path):
    content = coco_json()
    backwards = {key: rows[::-1] for key, rows in content.items()}
    one, two = (load_samples("coco", 6, 0, coco_folder(tmp_path / name, c))[0]
                for name, c in (("one", content), ("two", backwards)))
    assert [s[:2] for s in one] == [s[:2] for s in two]


@pytest.mark.parametrize("count", [0, -3])
def test_the_number_of_images_must_be_positive(count):
    with pytest.raises(UserError, match="1 or more"):
        load_samples("shapes", count)


def test_more_images_than_samples_is_an_error_that_gives_both_numbers(tmp_path):
    assert len(load_samples("coco", 12, 0, coco_folder(tmp_path))[0]) == 12
    with pytest.raises(UserError, match="13 images asked for, but coco has 12"):
        load_samples("coco", 13, 0, tmp_path)


@pytest.mark.parametrize("seed", [-1, 2 ** 32])
def test_a_seed_out_of_range_is_an_error(seed):
    with pytest.raises(UserError, match=f"seed {seed}"):
        load_samples("shapes", 1, seed)


# ---------------------------------------------------------------- shapes

def test_the_shapes_are_the_scenes_of_the_prompts_split():
    for sample in load_samples("shapes", 4)[0]:
        split, index = sample.id.split("-")
        scene = scenes.scene(split, int(index))
        assert split == "prompts"
        assert sample.caption == scene.caption
        assert sample.open_image().tobytes() == scenes.render(scene).tobytes()
        assert sample.file is None


@pytest.mark.parametrize("function", [
    partial(load_samples, num_images=1), partial(training_captions, count=1), partial(reference_samples, samples=[]),
    partial(other_samples, samples=[])])
def test_the_shapes_refuse_a_data_folder(tmp_path, function):
    with pytest.raises(UserError, match="drawn, not read from a folder.*--data_dir"):
        function("shapes", data_dir=tmp_path)


def test_the_reference_set_is_the_reference_split_of_the_shapes_and_the_samples_of_coco(tmp_path):
    samples, _ = load_samples("shapes", 3)
    reference = reference_samples("shapes", samples)
    assert len(reference) == 2048
    assert not {s.caption for s in reference} & {s.caption for s in load_samples("shapes", 512)[0]}
    assert reference[7].open_image().tobytes() == scenes.render(scenes.scene("reference", 7)).tobytes()
    photos, _ = load_samples("coco", 3, 0, coco_folder(tmp_path))
    assert reference_samples("coco", photos, tmp_path) == photos


def test_other_samples_exist_and_are_not_in_the_reference_set(tmp_path):
    samples, _ = load_samples("shapes", 3)
    assert other_samples("shapes", samples) == (samples, {})  # the reference split contains none of them
    folder = coco_folder(tmp_path)
    photos, _ = load_samples("coco", 5, 0, folder)
    others, left_out = other_samples("coco", photos, 0, folder)
    assert left_out == {}
    assert len({sample.id for sample in others} - {sample.id for sample in photos}) == 5
    (folder / "val2017" / others[0].id).unlink()
    fewer, left_out = other_samples("coco", photos, 0, folder)
    assert len(fewer) == 5
    assert others[0] not in fewer
    assert list(left_out.values()) == [{"count": 1, "first": [others[0].id]}]
    assert other_samples("coco", [*photos, *others[1:2]], 0, folder)[0] == []  # six others are needed, five exist


# ---------------------------------------------------------------- training captions

def test_no_training_caption_of_the_shapes_is_a_caption_of_a_sample():
    trained = training_captions("shapes", 300, exclude=load_samples("shapes", 512)[0])
    assert len(trained) == 300
    assert trained[:100] == training_captions("shapes", 100)
    assert trained != training_captions("shapes", 300, seed=1)
    assert not set(trained) & {s.caption for s in load_samples("shapes", 512)[0]}


def test_no_training_caption_of_coco_is_a_caption_of_a_sample(tmp_path):
    content = coco_json()
    first = content["annotations"][12:24]
    first[3]["caption"] = first[8]["caption"]  # two images with the same caption
    folder = coco_folder(tmp_path, content)
    everything = [s.caption for s in load_samples("coco", 12, 0, folder)[0]]
    for count in range(1, 11):
        samples, _ = load_samples("coco", count, 0, folder)
        left = [caption for caption in everything if caption not in {s.caption for s in samples}]
        assert sorted(training_captions("coco", len(left), 0, folder, samples)) == sorted(left)


def test_training_captions_do_not_change_with_the_number_of_samples(tmp_path):
    folder = coco_folder(tmp_path)
    few, many = (training_captions("coco", 4, 0, folder, load_samples("coco", n, 0, folder)[0]) for n in (1, 8))
    assert len(few) == 4
    assert few == many


def test_fewer_captions_left_for_training_than_asked_for_is_an_error_that_gives_their_number(tmp_path):
    samples, _ = load_samples("coco", 12, 0, coco_folder(tmp_path))
    with pytest.raises(UserError, match="no caption left to .* needs 1 more: measure fewer images, or add captions$"):
        training_captions("coco", 1, 0, tmp_path, samples)
    assert len(training_captions("coco", 3, 0, tmp_path, samples[:9])) == 3
    with pytest.raises(UserError, match="only 3 captions left .* needs 1 more: give --calibration_images 3 or measure"):
        training_captions("coco", 4, 0, tmp_path, samples[:9])


# ---------------------------------------------------------------- coco

@pytest.mark.parametrize("captions_at", ["annotations/captions_val2017.json", "captions_val2017.json"])
def test_coco_takes_the_caption_of_lowest_id_and_normalises_its_spaces(tmp_path, capsys, captions_at):
    samples, faults = load_samples("coco", 12, 0, coco_folder(tmp_path, captions_at=captions_at))
    assert {s.id: s.caption for s in samples} == {f"{n:012d}.jpg": f"A picture, number {n}." for n in range(1, 13)}
    assert faults == {}
    assert capsys.readouterr().out == ""


def test_the_images_of_coco_belong_to_their_captions(tmp_path):
    for sample in load_samples("coco", 12, 0, coco_folder(tmp_path))[0]:
        number = int(sample.caption.split()[-1].rstrip("."))
        assert abs(sample.open_image().getpixel((3, 3))[0] - 10 * number) < 6
        assert sample.file == tmp_path / "val2017" / f"{number:012d}.jpg"


@pytest.mark.parametrize("name", ["../1.jpg", "/etc/1.jpg", "a/1.jpg", "a\\1.jpg", "..jpg", "C:1.jpg", "1.jpg.1", ""])
def test_captions_without_the_plain_name_of_an_image_file_are_skipped_and_counted(tmp_path, name):
    content = coco_json(4)
    coco_folder(tmp_path, content)
    content["images"][1]["file_name"] = name
    content["annotations"][0]["caption"] = " \n"  # image 1 keeps two captions
    content["annotations"].append({"id": 9000, "image_id": 77, "caption": "an image that is not listed"})
    (tmp_path / coco.CAPTIONS).write_text(json.dumps(content))
    samples, faults = load_samples("coco", 3, 0, tmp_path)
    assert sorted(ids(samples)) == [f"{n:012d}.jpg" for n in (1, 3, 4)]
    assert {what: fault["count"] for what, fault in faults.items()} == {
        "Captions skipped because their image has no plain name that ends in .jpg or .png": 3,
        "Captions skipped because they are empty": 1,
        "Captions skipped because their image_id stands for no image": 1}


@pytest.mark.parametrize("content", [
    "", "{", "\x00\x01", "[]", "3", "{}", '{"images": [], "annotations": []}', '{"annotations": 3}',
    '{"images": [{"id": 1}], "annotations": [{"image_id": 1, "id": 1, "bbox": []}]}',
    '{"images": [{"file_name": "1.jpg"}], "annotations": []}',
    '{"images": [{"id": 1, "file_name": 5}], "annotations": [{"image_id": 1, "id": 1, "caption": "a"}]}',
    '{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "id": 1, "caption": null}]}',
    '{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": [1], "id": 1, "caption": "a"}]}',
    '{"images": [{"id": 1, "file_name": "1.jpg", "id": 2}], "annotations": [{"image_id": 1, "id": 1, "caption": "a"}]}',
])
def test_malformed_captions_of_coco_are_an_error_that_names_the_file(tmp_path, content):
    path = coco_folder(tmp_path) / coco.CAPTIONS
    path.write_text(content)
    with pytest.raises(UserError) as error:
        load_samples("coco", 1, 0, tmp_path)
    assert str(path) in str(error.value)
    assert "expected" in str(error.value)


def test_a_missing_part_of_coco_is_an_error_that_names_the_part(tmp_path):
    with pytest.raises(UserError, match="cannot open the folder .*nowhere"):
        load_samples("coco", 1, 0, tmp_path / "nowhere")
    with pytest.raises(UserError, match="expected annotations/captions_val2017.json or captions_val2017.json"):
        load_samples("coco", 1, 0, tmp_path)
    folder = coco_folder(tmp_path / "coco")
    (folder / "val2017" / "000000000003.jpg").unlink()
    assert len(training_captions("coco", 12, 0, folder)) == 12  # training captions need no image
    with pytest.raises(UserError, match="000000000003.jpg"):
        load_samples("coco", 12, 0, folder)
    (folder / "val2017").rename(folder / "train2017")
    with pytest.raises(UserError, match="expected val2017/"):
        load_samples("coco", 1, 0, folder)


def coco_captions(folder, images, annotations):
    """{image name: caption} and {what was skipped: where} of a COCO file with these images and annotations."""
    named = [dict(zip(("id", "file_name"), image)) for image in images]
    said = [dict(zip(("id", "image_id", "caption"), annotation)) for annotation in annotations]
    content = {"images": named, "annotations": said}
    (folder / "val2017").mkdir()
    (folder / "captions_val2017.json").write_text(json.dumps(content), encoding="utf-8")
    source = coco.read(folder)
    return ({sample.id: sample.caption for sample in source.samples},
            {what: fault["first"] for what, fault in source.faults.items()})


def test_annotations_that_share_an_id_keep_their_own_images(tmp_path):
    captions, faults = coco_captions(tmp_path, [(1, "a.jpg"), (2, "b.jpg")], [(7, 1, "of a"), (7, 2, "of b")])
    assert captions == {"a.jpg": "of a", "b.jpg": "of b"}
    assert faults == {}


def test_of_annotations_of_one_image_that_share_an_id_one_is_taken_and_the_other_named(tmp_path):
    for name, order in (("one", 1), ("two", -1)):
        (tmp_path / name).mkdir()
        said = [(7, 1, "x"), (7, 1, "y"), (7, 1, "x"), (9, 1, "z"), (9, 1, "w")][::order]
        captions, faults = coco_captions(tmp_path / name, [(1, "a.jpg")], said)
        assert captions == {"a.jpg": "x"}  # wherever it stands
        assert faults == {"Captions skipped because another one of their image has the same number":
                          ["annotations[1]" if order == 1 else "annotations[3]"]}


def test_a_caption_whose_image_id_stands_for_two_images_describes_neither(tmp_path):
    images = [(1, "a.jpg"), (1, "b.jpg"), (2, "c.jpg"), (2, "c.jpg"), ("2", "d.jpg")]
    captions, faults = coco_captions(tmp_path, images, [(1, 1, "of a or b"), (2, 2, "of c"), (3, "2", "of d")])
    assert captions == {"c.jpg": "of c", "d.jpg": "of d"}
    assert faults == {"Captions skipped because their image_id stands for several images":
                      ["annotations[0]: image_id 1"]}


def test_fields_of_wrong_types_cost_only_their_own_caption(tmp_path):
    images = [(1, "a.jpg"), ([2], "b.jpg"), (3, None), (True, "c.jpg")]
    said = [(1, 1, "good"), ("0", 1, "x"), (0, [1], "x"), (0, 1, 5), (False, 1, "x"), (0.5, 1, "x"), (8, 3, "x")]
    captions, faults = coco_captions(tmp_path, images, said)
    assert captions == {"a.jpg": "good"}
    assert faults == {
        "Images skipped because their id or file_name is missing or of a wrong type":
            ["images[1]", "images[2]", "images[3]"],
        "Captions skipped because their id, image_id or caption is missing or of a wrong type":
            ["annotations[1]", "annotations[2]", "annotations[3]"],
        "Captions skipped because their image_id stands for no image": ["annotations[6]: image_id 3"]}


def test_captions_with_what_is_no_text_are_skipped_and_emoji_stay(tmp_path):
    farmer = "\U0001f468\u200d\U0001f33e"  # two emoji that a character of no width joins
    said = [(1, 1, "half \ud83d"), (2, 1, "nul\0"), (3, 1, "\x1b[2J"), (4, 1, f" caf\xe9\u2028{farmer}")]
    captions, faults = coco_captions(tmp_path, [(1, "a.jpg")], said)
    assert captions == {"a.jpg": f"caf\xe9 {farmer}"}
    assert faults == {"Captions skipped because they hold characters that are no text":
                      [f"annotations[{n}]" for n in range(3)]}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_captions_of_coco_may_be_in_any_encoding_of_json(tmp_path, encoding):
    folder = coco_folder(tmp_path)
    content = json.dumps({**coco_json(), "annotations": [{"id": 1, "image_id": 1, "caption": "un caf\xe9"}]},
                         ensure_ascii=False)
    (folder / coco.CAPTIONS).write_bytes(content.encode(encoding))
    assert load_samples("coco", 1, 0, folder)[0][0].caption == "un caf\xe9"


# ---------------------------------------------------------------- flickr8k

@pytest.mark.parametrize("layout", FLICKR8K_LAYOUTS)
def test_all_layouts_of_flickr8k_give_the_same_samples(tmp_path, layout):
    samples, faults = load_samples("flickr8k", 6, 0, flickr8k_folder(tmp_path, layout))
    expected, _ = load_samples("flickr8k", 6, 0, flickr8k_folder(tmp_path / "token"))
    assert {s.id: s.caption for s in samples} == {f"{n}_ab.jpg": f"A dog , number {n}0 ." for n in range(6)}
    assert [s[:2] for s in samples] == [s[:2] for s in expected]
    assert faults == {}
    assert all(s.open_image().size == (24, 16) for s in samples)


def test_flickr8k_takes_caption_0_at_any_place_in_the_file(tmp_path):
    folder = flickr8k_folder(tmp_path)
    path = folder / "Flickr8k.token.txt"
    path.write_text("\n".join(reversed(path.read_text().split("\n"))))
    assert all(s.caption.endswith("0 .") for s in load_samples("flickr8k", 6, 0, folder)[0])


@pytest.mark.parametrize(("layout", "extra", "count"), [
    # a malformed name in the original file
    ("token", "".join(f"2258277193_586949ec62.jpg.1#{k}\tSome people .\n" for k in range(5)), 5),
    ("token", "../../secret.jpg#0\tA dog .\n/etc/x.jpg#0\tA dog .\n..\\x.jpg#0\tA dog .\n", 3),
    ("token", "no tab\n7.jpg\tno index\n7.jpg#x\tno number\n7.jpg#0\t \n\n\n", 4),
    ("kaggle", "../../secret.jpg,A dog .\n7.jpg\n7.jpg,A dog , no quotes\n7.jpg,\n,A dog .\n\n", 5),
])
def test_malformed_captions_of_flickr8k_are_skipped_and_counted(tmp_path, layout, extra, count):
    samples, faults = load_samples("flickr8k", 6, 0, flickr8k_folder(tmp_path, layout, extra))
    assert sorted(ids(samples)) == [f"{n}_ab.jpg" for n in range(6)]
    assert sum(fault["count"] for fault in faults.values()) == count


def test_a_quote_that_is_not_closed_costs_only_its_own_row(tmp_path):
    folder = flickr8k_folder(tmp_path, "kaggle")
    lines = (folder / "captions.txt").read_text().splitlines()
    lines[1], lines[11] = '0_ab.jpg,"A dog', '2_ab.jpg,"A "dog"'
    (folder / "captions.txt").write_text("\n".join(lines))
    samples, faults = load_samples("flickr8k", 6, 0, folder)
    assert {s.id: s.caption for s in samples} == {
        f"{n}_ab.jpg": f"A dog , number {n}{1 if n in (0, 2) else 0} ." for n in range(6)}
    assert sentences(faults) == [
        "Lines skipped that are no comma-separated values, such as those with an open quote: 2 (line 2; line 12)."]


@pytest.mark.parametrize("layout", ["token", "kaggle"])
def test_a_byte_order_mark_and_line_ends_of_windows_change_nothing(tmp_path, layout):
    folder = flickr8k_folder(tmp_path, layout)
    path = folder / FLICKR8K_LAYOUTS[layout][0]
    expected = [s[:2] for s in load_samples("flickr8k", 6, 0, folder)[0]]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    samples, faults = load_samples("flickr8k", 6, 0, folder)
    assert [s[:2] for s in samples] == expected
    assert faults == {}


@pytest.mark.parametrize(("layout", "content"), [
    ("token", b""), ("token", b"image,caption\n1.jpg,A dog .\n"), ("token", b"1.jpg#0\t\xff\xfe\n"),
    ("kaggle", b""), ("kaggle", b'"image,caption\n1.jpg,A dog .\n'), ("kaggle", b"x" * 200_000),
    ("kaggle", b"1.jpg,A dog .\n"), ("kaggle", b"image,caption\n"),
    ("kaggle", b"image,caption\n1.jpg,\xff\xfe\n"), ("kaggle", b'image,caption\n1.jpg,"' + b"x" * 200_000),
])
def test_malformed_caption_files_of_flickr8k_are_errors_that_name_the_file(tmp_path, layout, content):
    path = flickr8k_folder(tmp_path, layout) / FLICKR8K_LAYOUTS[layout][0]
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_samples("flickr8k", 1, 0, tmp_path)
    assert str(path) in str(error.value)
    assert "expected" in str(error.value)
    assert b"\xff" not in content or "in UTF-8" in str(error.value)


def test_a_missing_part_of_flickr8k_is_an_error_that_names_the_part(tmp_path):
    with pytest.raises(UserError, match="--data_dir"):
        load_samples("flickr8k", 1)
    with pytest.raises(UserError, match="cannot open the folder .*nowhere"):
        load_samples("flickr8k", 1, 0, tmp_path / "nowhere")
    with pytest.raises(UserError, match="Flickr8k.token.txt or .* or captions.txt"):
        load_samples("flickr8k", 1, 0, tmp_path)
    folder = flickr8k_folder(tmp_path / "flickr8k")
    (folder / "Flicker8k_Dataset" / "4_ab.jpg").unlink()
    with pytest.raises(UserError, match="4_ab.jpg"):
        load_samples("flickr8k", 6, 0, folder)
    (folder / "Flicker8k_Dataset").rename(folder / "Pictures")
    with pytest.raises(UserError, match="Flicker8k_Dataset/ or .*Images/"):
        load_samples("flickr8k", 1, 0, folder)


# ---------------------------------------------------------------- what is said of what is skipped

def test_faults_are_counted_and_the_first_three_named_on_one_short_line_that_no_terminal_obeys():
    faults = {}
    for where in ("line 1", "\x1b[2J\n\ud800", "x" * 1000, "line 4"):
        note(faults, "Captions skipped because they are empty", where)
    note(faults, "Lines skipped", "line 9")
    assert sentences(faults) == [
        "Captions skipped because they are empty: 4 (line 1; \\x1b[2J\\n\\ud800; " + "x" * 60 + "…; …).",
        "Lines skipped: 1 (line 9)."]


def test_too_few_samples_are_explained_by_what_was_skipped(tmp_path):
    flickr8k_folder(tmp_path, "kaggle", "7_ab.jpg,\n")
    with pytest.raises(UserError, match=r"7 images asked for, but flickr8k has 6. Captions skipped .* 1 \(line 32\)."):
        load_samples("flickr8k", 7, 0, tmp_path)
    (tmp_path / "captions.txt").write_text("image,caption\n../7_ab.jpg,A dog\n")
    with pytest.raises(UserError, match=r"no captions in .*captions.txt \(Captions .*: 1 \(line 2: ../7_ab"):
        load_samples("flickr8k", 1, 0, tmp_path)


def test_images_without_a_file_are_counted_and_named(tmp_path):
    names = [f"{n}_cd.jpg" for n in range(4)] + ["\u4e2d" * 200 + ".jpg"]  # the last is too long for a file
    folder = flickr8k_folder(tmp_path, "kaggle", "".join(f"{name},A dog\n" for name in names))
    (folder / "Images" / "0_cd.jpg").symlink_to(folder / "gone.jpg")
    (folder / "Images" / "1_cd.jpg").mkdir()
    with pytest.raises(UserError, match=r"a caption but no readable file in .*Images: 5 \(.*; .*; .*; …\)"):
        load_samples("flickr8k", 11, 0, folder)


def test_two_names_of_one_file_are_an_error(tmp_path):
    """As on a disk that does not tell A.jpg from a.jpg."""
    folder = flickr8k_folder(tmp_path, "kaggle", "0_AB.jpg,Another dog\n")
    (folder / "Images" / "0_AB.jpg").write_bytes(jpeg(7))
    assert len(load_samples("flickr8k", 7, 0, folder)[0]) == 7
    (folder / "Images" / "0_AB.jpg").unlink()
    (folder / "Images" / "0_AB.jpg").symlink_to(folder / "Images" / "0_ab.jpg")
    with pytest.raises(UserError, match="are one file on this disk"):
        load_samples("flickr8k", 7, 0, folder)


@pytest.mark.parametrize("kind", ["file", "link to itself"])
def test_a_data_folder_that_is_none_is_an_error(tmp_path, kind):
    path = tmp_path / "data"
    path.write_text("") if kind == "file" else path.symlink_to(path)
    with pytest.raises(UserError, match=r"cannot open the folder .*data \(.*it should contain the COCO captions"):
        load_samples("coco", 1, 0, path)


# ---------------------------------------------------------------- untrusted files

READERS = {"coco": ("annotations/captions_val2017.json", "val2017"), "token": ("Flickr8k.token.txt", "Images"),
           "kaggle": ("captions.txt", "Images"), "folder": ("metadata.jsonl", "")}
ANY = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=5), part, max_size=3),
                    max_leaves=6)


def read_any(folder, layout, content):
    """Read a caption file with this content: either all images lie in the image folder, or the error is one line."""
    captions_file, images = READERS[layout]
    (folder / captions_file).parent.mkdir(parents=True, exist_ok=True)
    (folder / images).mkdir(exist_ok=True)
    (folder / captions_file).write_bytes(content)
    samples, message = [], ""
    try:
        samples = DATASETS[layout if layout in DATASETS else "flickr8k"].read(folder).samples
    except UserError as error:
        message = str(error)
    assert bool(samples) != bool(message)
    assert all(sample.file.parent == folder / images for sample in samples)
    for sample in samples[:5]:
        with pytest.raises(UserError) as error:  # the image folder is empty
            sample.open_image()
        assert str(sample.file) in str(error.value)
    assert "\n" not in message
    assert len(message) < 1000


@pytest.mark.parametrize("layout", READERS)
@ANY
@given(start=st.sampled_from([b"", b"image,caption\n", b"1.jpg#0\t", b'{"images": [', b"[" * 60_000,
                              b'{"file_name": "1.jpg", "text": "']),
       content=st.binary(max_size=80))
def test_any_bytes_of_a_caption_file_give_samples_or_a_one_line_error(tmp_path, layout, start, content):
    read_any(tmp_path, layout, start + content)


@ANY
@given(data=st.data())
def test_any_value_in_the_captions_of_coco_gives_samples_or_a_one_line_error(tmp_path, data):
    content = coco_json(3)
    part = data.draw(st.sampled_from(["images", "annotations"]))
    field = data.draw(st.sampled_from(["", "id", "image_id", "file_name", "caption"]))
    value = data.draw(JSON | st.sampled_from(["../../x.jpg", "/etc/x.jpg", "..\\x.jpg", "a\0.jpg"]))
    if field:
        content[part][1][field] = value
    else:
        content[part][1] = value
    read_any(tmp_path, "coco", json.dumps(content).encode())


@pytest.mark.parametrize(("layout", "content"), [
    ("token", b"".join(b"%d.jpg#0\tA dog .\n" % n for n in range(10 ** 6))),
    ("token", b"x" * 10 ** 7 + b"#0\tA dog .\n"), ("token", b"1.jpg#" + b"1" * 10 ** 7 + b"\tA dog .\n"),
    ("token", b"#1" * (5 * 10 ** 6)), ("kaggle", b'image,caption\n1.jpg,"' + b"x" * 10 ** 7),
    ("coco", b'{"images": [], "annotations": [], "x": "' + b"x" * 10 ** 7),
], ids=["a million lines", "a long name", "a long number", "many numbers", "a long row", "a long string"])
def test_a_huge_caption_file_gives_samples_or_a_one_line_error(tmp_path, layout, content):
    read_any(tmp_path, layout, content)


def test_an_archive_is_unpacked_only_into_the_cache(mirror, monkeypatch):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as members:
        members.writestr("../../outside.json", "{}")
        members.writestr("annotations/captions_val2017.json", json.dumps(coco_json()))
    mirror.files[mirror.archive] = archive.getvalue()
    monkeypatch.setattr(coco, "ARCHIVE_HASH", "md5:" + hashlib.md5(archive.getvalue()).hexdigest())
    load_samples("coco", 1)
    assert not list(mirror.cache.parent.parent.rglob("outside.json"))


# ---------------------------------------------------------------- images

@pytest.mark.parametrize(("mode", "suffix"), [
    ("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("1", "png"), ("LA", "png"), ("RGBA", "png"), ("RGB", "jpg")])
def test_every_kind_of_image_is_opened_as_rgb(tmp_path, mode, suffix):
    path = tmp_path / f"image.{suffix}"
    Image.new("RGB", (9, 7), (255, 255, 255)).convert(mode).save(path)
    image = open_rgb(path)
    assert image.mode == "RGB"
    assert image.size == (9, 7)
    assert min(image.getpixel((4, 4))) > 250


@pytest.mark.parametrize("turned", [False, True])
def test_16_bit_grey_is_scaled_and_not_clamped(tmp_path, turned):
    values = np.array([[0, 128, 129, 32768, 65407, 65535]], np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 3 if turned else 1  # 3: upside down
    Image.fromarray(values).save(tmp_path / "grey.png", exif=exif)
    grey = np.asarray(open_rgb(tmp_path / "grey.png"))
    assert (grey == grey[..., :1]).all()
    assert grey[0, ::-1 if turned else 1, 0].tolist() == [0, 0, 1, 128, 255, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white_whatever_colour_it_hides(tmp_path, mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (9, 9, 9, 0))
    image = image.quantize(2) if mode == "P" else image.convert(mode)
    image.save(tmp_path / "clear.png")
    assert np.asarray(open_rgb(tmp_path / "clear.png"))[0].tolist() == [[0, 0, 0], [255, 255, 255]]


def test_a_transparent_grey_of_16_bits_is_white(tmp_path):
    Image.fromarray(np.array([[300, 65535, 40000]], np.uint16)).save(tmp_path / "grey.png", transparency=300)
    assert np.asarray(open_rgb(tmp_path / "grey.png"))[0, :, 0].tolist() == [255, 255, 156]


def frames(path):
    picture(1).save(path, "GIF", save_all=True, append_images=[picture(9)])


@pytest.mark.parametrize(("save", "words"), [
    (frames, "it has 2 frames"),
    (lambda path: Image.fromarray(np.ones((4, 4), np.float32)).save(path, "TIFF"), "its mode F does not say"),
    (lambda path: Image.fromarray(np.ones((4, 4), np.int32)).save(path, "TIFF"), "its mode I does not say"),
])
def test_an_image_that_can_be_read_in_two_ways_is_an_error(tmp_path, save, words):
    save(tmp_path / "odd.png")
    with pytest.raises(UserError, match=f"odd.png .{words}"):
        open_rgb(tmp_path / "odd.png")


def test_the_preview_that_a_camera_adds_to_a_jpeg_does_no_harm(tmp_path):
    picture(1).save(tmp_path / "camera.jpg", "MPO", save_all=True, append_images=[picture(9)])
    assert open_rgb(tmp_path / "camera.jpg").size == (24, 16)


def test_an_image_of_one_pixel_is_that_pixel(tmp_path):
    Image.new("RGB", (1, 1), (10, 20, 30)).save(tmp_path / "dot.png")
    assert (np.asarray(fit_image(open_rgb(tmp_path / "dot.png"), 8)) == (10, 20, 30)).all()


def test_an_image_is_turned_by_its_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # display the image turned clockwise by 90 degrees
    stored = Image.new("RGB", (32, 16), (0, 0, 0))
    stored.paste((255, 255, 255), (0, 0, 16, 16))  # the left half becomes the upper half
    stored.save(tmp_path / "turned.jpg", exif=exif)
    shown = open_rgb(tmp_path / "turned.jpg")
    assert shown.size == (16, 32)
    assert min(shown.getpixel((8, 4))) > 250
    assert max(shown.getpixel((8, 28))) < 5


@pytest.mark.parametrize("body", [b"", b"<html>not found</html>", jpeg()[:300], jpeg()[:-40], b"\x89PNG\r\n\x1a\n1234"])
def test_a_broken_image_is_an_error_that_names_the_file(tmp_path, body):
    folder = coco_folder(tmp_path)
    samples, _ = load_samples("coco", 12, 0, folder)
    (folder / "val2017" / samples[5].id).write_bytes(body)
    with pytest.raises(UserError, match=samples[5].id):
        load_originals(samples, 8)


def test_broken_images_are_counted_and_the_first_three_named_before_the_work(tmp_path):
    folder = coco_folder(tmp_path)
    samples, _ = load_samples("coco", 12, 0, folder)
    for index in (1, 4, 7, 9):
        (folder / "val2017" / samples[index].id).write_bytes(jpeg()[:-40])
    named = "; ".join(f"{samples[index].id}: .*" for index in (1, 4, 7))
    message = f"^Images in {folder / 'val2017'} that cannot be read: 4 .{named}; ….. Replace"
    with pytest.raises(UserError, match=message):
        originals.content_hash(samples, 8)


@pytest.mark.parametrize(("width", "height"), [(90, 30), (30, 90), (91, 31)])
def test_fit_image_keeps_the_centred_square(width, height):
    image = Image.new("RGB", (width, height), (255, 0, 0))
    side, left, top = min(width, height), (width - min(width, height)) // 2, (height - min(width, height)) // 2
    image.paste((0, 0, 255), (left, top, left + side, top + side))
    fitted = np.asarray(fit_image(image, 16))
    assert fitted.shape == (16, 16, 3)
    assert (fitted == (0, 0, 255)).all()


def test_fit_image_averages_details_smaller_than_a_pixel():
    checks = (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)
    fitted = np.asarray(fit_image(Image.fromarray(checks), 16)).astype(int)
    assert abs(fitted - 127).max() <= 2


def test_fit_image_does_not_change_an_image_of_the_right_size():
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8))
    assert fit_image(image, 64).tobytes() == image.tobytes()


def test_originals_are_in_the_order_of_the_samples(tmp_path):
    samples, _ = load_samples("coco", 5, 0, coco_folder(tmp_path))
    originals = load_originals(samples, 8)
    assert originals.shape == (5, 8, 8, 3)
    assert originals.dtype == np.uint8
    for original, sample in zip(originals, samples):
        assert (original == np.asarray(fit_image(sample.open_image(), 8))).all()


# ---------------------------------------------------------------- fetching

def serve(self):
    """Answer a GET from server.files; each answer uses up the first fault of server.faults[path]."""
    server, path = self.server, self.path
    with server.lock:
        server.asked.append(path)
        fault = server.faults[path].pop(0) if server.faults.get(path) else ""
    body = server.files.get(path)
    if body is None or fault == "error":
        self.send_error(500 if body else 404)
        return
    self.send_response(200)
    if fault != "no length":
        self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body[:-40] if fault else body)
    self.close_connection = True


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A local mirror of COCO, and an empty cache for the fetched files."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as members:
        members.writestr("annotations/captions_val2017.json", json.dumps(coco_json()))
        members.writestr("annotations/instances_val2017.json", "{}")
    handler = type("Handler", (http.server.BaseHTTPRequestHandler,), {"do_GET": serve, "log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.lock, server.asked, server.faults = threading.Lock(), [], {}
    server.archive = "/annotations/annotations_trainval2017.zip"
    server.files = {server.archive: archive.getvalue(),
                    **{f"/val2017/{n:012d}.jpg": jpeg(n) for n in range(1, 13)}}
    server.cache = tmp_path / "cache" / "coco"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("PRUNING_COCO_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(coco, "ARCHIVE_HASH", "md5:" + hashlib.md5(archive.getvalue()).hexdigest())
    yield server
    server.shutdown()
    server.server_close()


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_only_needed_files_are_fetched_and_only_once(mirror, capfd):
    samples, _ = load_samples("coco", 4)
    assert sorted(mirror.asked) == sorted([mirror.archive] + [f"/val2017/{i}" for i in ids(samples)])
    assert files_in(mirror.cache) == sorted([coco.CAPTIONS] + [f"val2017/{i}" for i in ids(samples)])
    mirror.asked.clear()
    more, _ = load_samples("coco", 6)
    assert ids(more[:4]) == ids(samples)
    assert sorted(mirror.asked) == sorted(f"/val2017/{i}" for i in ids(more[4:]))
    mirror.asked.clear()
    assert load_originals(load_samples("coco", 6)[0], 8).shape == (6, 8, 8, 3)
    training_captions("coco", 3, exclude=samples)
    assert mirror.asked == []
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")  # no bars in files
    assert not pooch.get_logger().isEnabledFor(logging.INFO)  # no line for each file
    # The cache has the layout of a data folder.
    assert [s[:2] for s in load_samples("coco", 6, 0, mirror.cache)[0]] == [s[:2] for s in more]


def test_a_failed_download_is_tried_again(mirror):
    mirror.faults = {path: [fault] for path, fault in zip(mirror.files, 5 * ["error", "cut", "no length"])}
    samples, _ = load_samples("coco", 12)
    assert len(mirror.asked) == 2 * 13
    for sample in samples:
        assert (mirror.cache / "val2017" / sample.id).read_bytes() == mirror.files[f"/val2017/{sample.id}"]
    assert len(files_in(mirror.cache)) == 13


@pytest.mark.parametrize("fault", ["error", "cut", "no length"])
def test_incomplete_images_leave_no_file_behind(mirror, monkeypatch, fault):
    monkeypatch.setattr(fetching, "RETRIES", 0)
    mirror.faults = {path: [fault] for path in mirror.files if path != mirror.archive}
    with pytest.raises(UserError, match="val2017.zip.*--data_dir"):
        load_samples("coco", 12)
    assert files_in(mirror.cache) == [coco.CAPTIONS]


def test_a_web_page_sent_instead_of_an_image_is_an_error(mirror, monkeypatch):
    monkeypatch.setattr(fetching, "RETRIES", 0)
    bad = load_samples("coco", 3)[0][2].id
    (mirror.cache / "val2017" / bad).unlink()
    mirror.files[f"/val2017/{bad}"] = b"<html>please log in</html>"
    with pytest.raises(UserError, match=f"{bad} sent no complete image"):
        load_samples("coco", 3)
    assert f"val2017/{bad}" not in files_in(mirror.cache)


@pytest.mark.parametrize("fault", ["error", "cut", "no length", "hash"])
def test_incomplete_captions_leave_no_file_behind(mirror, monkeypatch, fault):
    monkeypatch.setattr(fetching, "RETRIES", 0)
    if fault == "hash":
        mirror.files[mirror.archive] += b"changed"
    else:
        mirror.faults = {mirror.archive: [fault]}
    with pytest.raises(UserError, match="annotations_trainval2017.zip.*--data_dir"):
        load_samples("coco", 1)
    assert mirror.asked == [mirror.archive]
    assert files_in(mirror.cache) == []


def test_the_error_without_a_network_names_the_files_to_download_and_the_flag(tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "RETRIES", 0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PRUNING_COCO_URL", "http://127.0.0.1:9/")  # no server listens on this port
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path))
    with pytest.raises(UserError) as error:
        load_samples("coco", 1)
    for part in ("http://127.0.0.1:9/annotations/annotations_trainval2017.zip", "http://127.0.0.1:9/zips/val2017.zip",
                 "--data_dir"):
        assert part in str(error.value)
    assert files_in(tmp_path) == []


def test_a_cache_that_cannot_be_created_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot fetch"):
        load_samples("coco", 1)
