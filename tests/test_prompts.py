"""Prompts and image folders of the user's own are data sets, and what prompts cannot be measured by is named."""
from __future__ import annotations

import json
import re

import pytest
from test_data import files_in, jpeg, mirror  # noqa: F401 - fixtures

from pruning import UserError, prefetch, pruning_analysis
from pruning.data import DATASETS, fetching, load_samples, training_captions
from pruning.data.prompts import PARTI
from pruning.metrics import DEFAULT, METRICS
from pruning.records.record import read_record

NEEDY = ["kid", "cmmd", "fid", "lpips"]
FLAGS = ["--dataset", "prompts", "--model", "shapes-unet", "--metric_backbones", "bundled", "--num_images", "3",
         "--steps", "1", "--device", "cpu", "--rates", "0.5"]


def written(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def read(dataset, path):
    """{id: caption} and {what was skipped: where} of a data set."""
    source = DATASETS[dataset].read(path)
    return ({sample.id: sample.caption for sample in source.samples},
            {what: fault["first"] for what, fault in source.faults.items()})


# ---------------------------------------------------------------- prompts

def test_a_prompt_a_line_is_known_by_its_line(tmp_path):
    path = written(tmp_path, "prompts.txt", '\ufeffa red circle\n\n  two  squares, "one" blue \r\na red circle\n')
    assert read("prompts", path) == (
        {"000001": "a red circle", "000003": 'two squares, "one" blue', "000004": "a red circle"}, {})


@pytest.mark.parametrize(("name", "text"), [
    ("p.csv", 'id,prompt,note\nr,"a red, round circle",x\nb,a "blue" square,\n'),
    ("p.tsv", 'Prompt\tId\na red, round circle\tr\na "blue" square\tb\n'),
    ("p.jsonl", '{"id": "r", "text": "a red, round circle"}\n\n{"id": "b", "caption": "a \\"blue\\" square"}\n'),
])
def test_rows_have_ids_and_prompts_whatever_the_format(tmp_path, name, text):
    assert read("prompts", written(tmp_path, name, text)) == ({"r": "a red, round circle", "b": 'a "blue" square'}, {})


def test_whole_numbers_are_ids_and_rows_without_an_id_are_known_by_their_line(tmp_path):
    path = written(tmp_path, "p.jsonl", '{"id": 7, "prompt": "seven"}\n{"prompt": "second"}\n')
    assert read("prompts", path) == ({"7": "seven", "000002": "second"}, {})


def test_what_cannot_be_used_of_prompts_is_skipped_and_named(tmp_path):
    rows = ['{"id": "a", "prompt": "first"}', '{"id": "a", "prompt": "second"}', '{"id": "b"}', "[1]", "{",
            '{"id": "c", "prompt": " "}', '{"id": "", "prompt": "x"}', '{"id": "d", "prompt": "half \\ud83d"}', "null"]
    captions, faults = read("prompts", written(tmp_path, "p.jsonl", "\n".join(rows)))
    assert captions == {"a": "first"}
    assert faults == {
        "Prompts skipped because an earlier one has the same id": ["line 2: a"],
        "Lines skipped that have no prompt": ["line 3"],
        "Lines skipped that are no JSON object": ["line 4", "line 5", "line 9"],
        "Captions skipped because they are empty": ["line 6"],
        "Captions skipped because their id is no text of 1 to 250 characters": ["line 7: no name"],
        "Captions skipped because they hold characters that are no text": ["line 8"]}


@pytest.mark.parametrize(("name", "text", "words"), [
    ("p.txt", "", "expected a prompt a line"), ("p.csv", "a,b\n1,2\n", "its first line names no column prompt or"),
    ("p.tsv", "", "names no column"), ("p.jsonl", "[]", "there are no captions in .*no JSON object: 1"),
])
def test_a_file_without_prompts_is_an_error_that_names_it(tmp_path, name, text, words):
    path = written(tmp_path, name, text)
    with pytest.raises(UserError, match=words) as error:
        load_samples("prompts", 1, 0, path)
    assert str(path) in str(error.value)


def test_a_missing_file_of_prompts_is_an_error_that_says_what_to_give(tmp_path):
    with pytest.raises(UserError, match="a prompt a line, or .* as --data_dir"):
        load_samples("prompts", 1)
    for path in (tmp_path, tmp_path / "nowhere.txt"):
        with pytest.raises(UserError, match=f"cannot read {path}"):
            load_samples("prompts", 1, 0, path)


def test_a_prompt_that_is_measured_calibrates_nothing_and_an_error_says_how_many_more_are_needed(tmp_path):
    path = written(tmp_path, "prompts.txt", "".join(f"prompt {n}\n" for n in range(9)) + "prompt 3\n")
    samples, _ = load_samples("prompts", 5, 0, path)
    left = {f"prompt {n}" for n in range(9)} - {sample.caption for sample in samples}
    assert set(training_captions("prompts", len(left), 0, path, samples)) == left
    with pytest.raises(UserError, match=r"left to calibrate on and needs \d more: "):
        training_captions("prompts", 12, 0, path, samples)


# ---------------------------------------------------------------- what needs originals

def test_metrics_that_need_originals_are_left_out_on_screen_and_in_the_record(tmp_path, capsys):
    path = written(tmp_path, "prompts.txt", "a large red circle\na blue square\na green triangle\n")
    pruning_analysis.main([*FLAGS, "--data_dir", str(path), "--results_dir", str(tmp_path)])
    line = "Metrics left out because prompts has no original images: 4 (kid; cmmd; fid; lpips)."
    said = capsys.readouterr()
    assert line in said.err.splitlines()
    assert "magnitude pruning of shapes-unet on cpu: dense and rate 0.5, 3 images of prompts at each rate" in said.err
    assert re.search(r"^6 images take about \d.* by the first batch", said.err, re.MULTILINE)
    assert "%|" not in said.err  # no bars
    assert said.out.startswith("How far? ")
    assert len(said.out.splitlines()) <= 10
    assert any(line.endswith("magnitude.json") for line in said.out.splitlines())
    record = read_record(tmp_path / "shapes-unet" / "prompts" / "magnitude.json")
    assert list(record.points[0].metrics) == [name for name in DEFAULT if name not in NEEDY]
    assert list(record.notes.faults.values()) == [{"count": 4, "first": NEEDY}]
    summary = " ".join((tmp_path / "shapes-unet" / "prompts" / "magnitude.txt").read_text(encoding="utf-8").split())
    assert line in summary


def test_asking_for_a_metric_that_needs_originals_is_an_error(tmp_path):
    path = written(tmp_path, "prompts.txt", "a\nb\nc\n")
    with pytest.raises(UserError, match="prompts has no original .* by kid and fid: give other --metrics"):
        pruning_analysis.main([*FLAGS, "--data_dir", str(path), "--results_dir", str(tmp_path / "r"),
                               "--metrics", "fid", "clip_score", "kid"])
    assert not (tmp_path / "r").exists()


def test_a_metric_needs_originals_if_it_compares_with_real_images():
    assert [name for name, metric in METRICS.items() if metric.needs_originals] == NEEDY


# ---------------------------------------------------------------- PartiPrompts

PROMPTS = 'Prompt\tCategory\tChallenge\tNote\n"G I G" painted, in red\tArts\tBasic\t\n' + "".join(
    f"prompt {n}\tAbstract\tBasic\tnote {n}\n" for n in range(1631))


@pytest.fixture
def parti(mirror, monkeypatch):  # noqa: F811
    """A local server of PartiPrompts, and an empty cache."""
    monkeypatch.setenv("PRUNING_PARTI_URL", f"http://127.0.0.1:{mirror.server_port}/")
    mirror.files[f"/{PARTI}"] = PROMPTS.encode()
    mirror.cache = mirror.cache.parent / "parti"
    return mirror


def test_parti_prompts_are_fetched_once_and_quotes_stay_in_them(parti, capsys):
    captions, faults = read("parti", None)
    assert (len(captions), faults) == (1632, {})
    assert captions["000002"] == '"G I G" painted, in red'
    assert read("parti", None) == read("parti", parti.cache / PARTI) == (captions, faults)
    assert parti.asked == [f"/{PARTI}"]
    prefetch.main(["--dataset", "parti", "--model", "shapes-unet", "--metric_backbones", "bundled"])
    assert "parti, 32 prompts: no images to fetch" in capsys.readouterr().out


def test_a_failed_download_of_parti_prompts_is_tried_again(parti):
    parti.faults = {f"/{PARTI}": ["no length"]}
    assert len(read("parti", None)[0]) == 1632
    assert len(parti.asked) == 2


@pytest.mark.parametrize("fault", ["error", "cut", "no length", "page"])
def test_incomplete_parti_prompts_leave_no_file_behind(parti, monkeypatch, fault):
    monkeypatch.setattr(fetching, "RETRIES", 0)
    parti.faults = {f"/{PARTI}": [fault]}
    if fault == "page":
        parti.faults, parti.files[f"/{PARTI}"] = {}, b"<html>please log in</html>\n" * 2000
    with pytest.raises(UserError, match=f"cannot fetch PartiPrompts: download .*/{PARTI} and give that .* --data_dir"):
        load_samples("parti", 1)
    assert files_in(parti.cache) == []


# ---------------------------------------------------------------- image folders

def image_folder(folder, names, list_name, text):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(number))
    written(folder, list_name, text)
    return folder


ROWS = [{"file_name": "a.jpg", "text": "a red, round circle"}, {"file_name": "train/b.jpg", "text": "a blue square"}]


@pytest.mark.parametrize(("images", "name", "text"), [
    ("", "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS)),
    ("", "metadata.csv", 'file_name,text\na.jpg,"a red, round circle"\ntrain/b.jpg,a blue square\n'),
    ("", "captions.txt", 'image,caption\na.jpg,"a red, round circle"\na.jpg,another\ntrain/b.jpg,a blue square\n'),
    ("Images/", "captions.txt", 'image,caption\na.jpg,"a red, round circle"\ntrain/b.jpg,a blue square\n'),
])
def test_any_folder_of_images_with_a_list_of_captions_is_a_data_set(tmp_path, images, name, text):
    folder = image_folder(tmp_path, [f"{images}a.jpg", f"{images}train/b.jpg"], name, text)
    samples, faults = load_samples("folder", 2, 0, folder)
    assert faults == {}
    assert {s.id: s.caption for s in samples} == {"a.jpg": "a red, round circle", "train/b.jpg": "a blue square"}
    assert {s.open_image().size for s in samples} == {(24, 16)}


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/a.jpg", "x/../../a.jpg", "x//a.jpg", "x\\a.jpg", "C:/a.jpg", "gif"])
def test_a_list_leads_to_no_image_outside_the_folder(tmp_path, name):
    rows = [{"file_name": "a.jpg", "text": "inside"}, {"file_name": name, "text": "outside"}]
    folder = image_folder(tmp_path, ["a.jpg"], "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    captions, faults = read("folder", folder)
    assert captions == {"a.jpg": "inside"}
    assert list(faults.values()) == [[f"line 2: {name}"]]


def test_a_missing_part_of_an_image_folder_is_an_error_that_names_the_part(tmp_path):
    with pytest.raises(UserError, match="metadata.jsonl or .*captions.txt: give it as --data_dir"):
        load_samples("folder", 1)
    with pytest.raises(UserError, match="expected metadata.jsonl or .* in that folder"):
        load_samples("folder", 1, 0, tmp_path)
    image_folder(tmp_path, [], "metadata.jsonl", json.dumps({"file_name": "gone.jpg", "text": "x"}))
    with pytest.raises(UserError, match="gone.jpg"):
        load_samples("folder", 1, 0, tmp_path)
