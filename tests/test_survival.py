"""A sweep survives cuts, broken files and full disks: no image is made twice, and the record ends the same."""
from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pruning import UserError, pruning_analysis, steps, sweep, test_single_rate
from pruning.models import generation
from pruning.records import grids, store
from pruning.records.record import read_record

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["--num_images", "6", "--steps", "2", "--batch_size", "2", "--device", "cpu", "--rates", "0.3", "0.8"]
CHEAP = ["--metrics", "clip_score", "lpips_dense", "fid"]
DAMAGES = {"cut": lambda data: data[:len(data) // 2], "empty": lambda data: b"",
           "garbage": lambda data: os.urandom(500)}


def measure(folder, *flags):
    """Run the command in this process and return the record."""
    pruning_analysis.main([*QUICK, "--results_dir", str(folder), *flags])
    return read_record(Path(folder) / "shapes-unet" / "shapes" / "magnitude.json")


def without_times(record):
    """Everything in a record except times."""
    data = json.loads(json.dumps(dataclasses.asdict(record)))
    for point in (data["dense"], *data["points"]):
        for name in [name for name in point if "seconds" in name or name == "ratio_intervals"]:
            del point[name]
        point["metrics"].pop("generation_time", None)
    return data


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, measure(folder, *CHEAP)


@pytest.fixture
def made(monkeypatch):
    """The number of images that each call of the pipeline makes, calls left out in which the denoiser computes once."""
    counts, generate = [], generation.generate

    def counting(pipeline, samples, **settings):
        if "forward" not in vars(pipeline.unet):  # see generation.computing_once
            counts.append(len(samples))
        return generate(pipeline, samples, **settings)

    monkeypatch.setattr(generation, "generate", counting)
    return counts


def test_a_run_cut_off_between_images_makes_only_the_missing_images(tmp_path, made, monkeypatch, whole):
    counting = generation.generate

    def cut_off(*args, **settings):
        if len(made) == 5:  # three batches of dense, two at 0.3
            raise KeyboardInterrupt
        return counting(*args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(generation, "generate", cut_off)
        with pytest.raises(KeyboardInterrupt):
            measure(tmp_path, *CHEAP)
    assert made == [2] * 5
    assert without_times(measure(tmp_path, *CHEAP)) == without_times(whole[1])
    assert made == [2] * 9


def test_a_thing_is_written_while_the_next_is_drawn_and_what_was_drawn_is_written_whatever_happens():
    """The writer of the first thing waits until the second is drawn, which a loop that takes turns never reaches."""
    drawn, written, second = [], [], threading.Event()

    def draw():
        for number in range(4):
            if number == 3:
                raise KeyboardInterrupt
            drawn.append(number)
            if number == 1:
                second.set()
            yield number

    def write(number):
        assert second.wait(60)
        written.append(number)

    with pytest.raises(KeyboardInterrupt):
        steps.use_beside(draw(), write)
    assert drawn == written == [0, 1, 2]


@pytest.mark.parametrize("broken", [0, 2])
def test_what_cannot_be_written_is_an_error_before_the_thing_after_the_next_is_drawn(broken):
    drawn = []

    def write(number):
        if number == broken:
            raise UserError("the disk is full")

    with pytest.raises(UserError, match="the disk is full"):
        steps.use_beside((drawn.append(number) or number for number in range(3)), write)
    assert drawn == list(range(min(broken + 2, 3)))


def test_things_made_ahead_come_in_order_and_so_do_errors():
    def make():
        yield from "abc"
        raise UserError("gone")

    things = steps.made_ahead(make())
    assert [next(things) for _ in range(2)] == ["a", "b"]
    with pytest.raises(UserError, match="gone"):
        list(things)


def test_a_metric_added_later_makes_no_image_and_equals_one_measured_at_once(tmp_path, made, whole):
    measure(tmp_path, "--metrics", "clip_score")
    before = len(made)
    record = measure(tmp_path, "--metrics", "fid", "lpips_dense")
    assert len(made) == before
    assert without_times(record) == without_times(whole[1])


def test_an_image_of_other_settings_or_a_changed_file_is_made_again(tmp_path, made):
    measure(tmp_path, *CHEAP)
    folder = tmp_path / "shapes-unet" / "shapes"
    (folder / "magnitude.json").unlink()
    before = len(made)
    measure(tmp_path, *CHEAP, "--guidance_scale", "3")
    assert len(made) == before + 9  # all of them
    (folder / "magnitude.json").unlink()
    Image.new("RGB", (64, 64)).save(folder / "images/magnitude/0.3/0001.png")  # without its provenance
    measure(tmp_path, *CHEAP, "--guidance_scale", "3")
    assert len(made) == before + 9 + 1  # the batch of that image


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_image_is_set_aside_with_a_message(damage, tmp_path, capfd):
    path = tmp_path / "0000.png"
    store.save_image(store.Made(np.zeros((8, 8, 3), np.uint8), True, 0.5, 3), path, "origin")
    assert store.load_image(path, "origin").calls == 3
    broken = DAMAGES[damage](path.read_bytes())
    path.write_bytes(broken)
    assert store.load_image(path, "origin") is None
    aside = path.with_name(path.name + ".broken")
    assert aside.read_bytes() == broken
    printed = capfd.readouterr()
    assert aside.name in printed.err + printed.out


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_record_is_set_aside_with_a_message(damage, tmp_path, whole, capfd):
    path = tmp_path / "magnitude.json"
    broken = DAMAGES[damage]((whole[0] / "shapes-unet/shapes/magnitude.json").read_bytes())
    path.write_bytes(broken)
    assert sweep.earlier_record(path) is None
    aside = path.with_name(path.name + ".broken")
    assert aside.read_bytes() == broken
    assert aside.name in capfd.readouterr().err


def test_a_sweep_with_broken_files_ends_with_the_record_of_an_undisturbed_one(tmp_path, whole, made):
    shutil.copytree(str(whole[0] / "shapes-unet"), str(tmp_path / "shapes-unet"))
    own = tmp_path / "shapes-unet" / "shapes"
    for file in ("magnitude.json", "images/magnitude/0.3/0001.png", "images/magnitude/dense/0000.png"):
        (own / file).write_bytes(DAMAGES["cut"]((own / file).read_bytes()))
    assert without_times(measure(tmp_path, *CHEAP)) == without_times(whole[1])
    assert made == [2, 2]  # the two batches with a broken image


def test_discarded_images_leave_those_of_the_figure_and_are_made_again_when_needed(tmp_path, made):
    flags = ["--num_images", str(grids.ROWS + 4)]
    discarded = measure(tmp_path, "--metrics", "clip_score", "--discard_images", *flags)
    shown = sorted(grids.shown_images(discarded))
    assert shown[:grids.ROWS] == list(range(grids.ROWS))  # and those that lose most
    kept = {rate: {int(path.stem) for path in (tmp_path / "shapes-unet/shapes/images/magnitude" / rate).iterdir()}
            for rate in ("dense", "0.3", "0.8")}
    assert sorted(kept["dense"]) == sorted(kept["0.3"]) == shown
    assert kept["0.8"] <= set(shown)
    lacking = sum(not {first, first + 1} <= found for found in kept.values() for first in range(0, grids.ROWS + 4, 2))
    assert 0 < lacking < 15
    before = len(made)
    record = measure(tmp_path, *CHEAP, *flags)
    assert len(made) == before + lacking  # the batches that lack an image
    assert record.points[1].per_image["clip_score"] == discarded.points[1].per_image["clip_score"]


def test_a_shard_started_afresh_leaves_the_images_of_other_shards(tmp_path):
    own = tmp_path / "shapes-unet" / "shapes" / "images" / "magnitude"
    flags = [*QUICK, *CHEAP, "--results_dir", str(tmp_path)]
    for part in ("1/2", "2/2"):
        pruning_analysis.main([*flags, "--shard", part])
    before = {path: path.stat().st_mtime_ns for path in own.rglob("*.png")}
    pruning_analysis.main([*flags, "--shard", "2/2", "--overwrite"])
    for path, written in before.items():
        assert (path.stat().st_mtime_ns == written) == (path.parent.name != "0.8"), path


def test_a_sweep_started_afresh_waits_for_shards_that_run(tmp_path):
    path = tmp_path / "shapes-unet" / "shapes" / "magnitude.json"
    measure(tmp_path, *CHEAP)
    before = sorted(tmp_path.rglob("*.png"))
    with store.only_writer(path.with_name("magnitude.1of2.json")), pytest.raises(UserError, match=r"1of2\.json"):
        measure(tmp_path, *CHEAP, "--overwrite")
    assert sorted(tmp_path.rglob("*.png")) == before


def test_images_that_vanish_while_a_sweep_runs_end_it_in_one_line(tmp_path, monkeypatch):
    run = pruning_analysis.run_pruning_experiment

    def deleting(experiment, rate, *rest):
        point = run(experiment, rate, *rest)
        if rate == 0:
            shutil.rmtree(experiment.images_folder)
        return point

    monkeypatch.setattr(pruning_analysis, "run_pruning_experiment", deleting)
    with pytest.raises(UserError, match="vanished: give the same command again"):
        measure(tmp_path, *CHEAP)
    monkeypatch.undo()
    assert len(measure(tmp_path, *CHEAP).points) == 2


def test_a_single_rate_joins_the_sweep_in_its_folder_and_deletes_nothing(tmp_path, capsys):
    sweep_ = measure(tmp_path, *CHEAP)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png") if "images" in path.parts}
    single = [*QUICK[:QUICK.index("--rates")], *CHEAP, "--results_dir", str(tmp_path)]
    test_single_rate.main([*single, "--rate", "0.65"])
    joined = read_record(tmp_path / "shapes-unet" / "shapes" / "magnitude.json")
    assert [point.rate for point in joined.points] == sorted([*(point.rate for point in sweep_.points), 0.65])
    assert all(path.read_bytes() == content for path, content in before.items())
    with pytest.raises(UserError, match="seed: 0 and 5"):
        test_single_rate.main([*single, "--rate", "0.65", "--seed", "5"])
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_second_process_on_the_same_record_is_refused(tmp_path):
    path = tmp_path / "shapes-unet" / "shapes" / "magnitude.json"
    with store.only_writer(path):
        with pytest.raises(UserError, match="another process is writing"):
            measure(tmp_path, *CHEAP)
        code = ("from pruning.records import store; from pathlib import Path\n"
                f"with store.only_writer(Path({str(path)!r})): pass")
        other = subprocess.run([sys.executable, "-c", code], cwd=str(ROOT), capture_output=True, text=True)
        assert "another process is writing" in other.stderr
    assert list(path.parent.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line_before_anything_is_measured(tmp_path, made):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write into"):
        measure(tmp_path / "file", *CHEAP)
    (tmp_path / "folder").mkdir(mode=0o500)
    if not os.access(str(tmp_path / "folder"), os.W_OK):  # root may write everywhere
        with pytest.raises(UserError, match="cannot write into"):
            measure(tmp_path / "folder", *CHEAP)
    assert not made


@pytest.mark.parametrize(("limit", "first"), [
    (2000, "0000.png"), (100_000, "magnitude_images.png"),
    pytest.param(9000, "magnitude.json", marks=pytest.mark.slow)])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(limit, first, tmp_path, whole):
    """The system's limit on the size of files makes writes fail as a full disk does."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(UserError, match=f"cannot write .*{first}"):
            measure(tmp_path, *CHEAP)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix not in (".png", ".json")]
    assert without_times(measure(tmp_path, *CHEAP)) == without_times(whole[1])


def test_a_fresh_start_that_fails_leaves_the_earlier_record_and_says_why(tmp_path, monkeypatch):
    own = tmp_path / "shapes-unet" / "shapes"
    own.mkdir(parents=True)
    (own / "magnitude.json").write_text("{")

    def full(*_, **__):
        raise UserError("the disk is full")

    monkeypatch.setattr(generation, "generate", full)
    with pytest.raises(UserError, match="the disk is full"):
        measure(tmp_path, *CHEAP, "--overwrite", "--batch_size", "2")
    assert [path.name for path in own.iterdir()] == ["magnitude.json"]


def test_features_of_real_images_are_computed_once_and_again_if_anything_differs(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path))
    images, computed = np.random.RandomState(0).randint(0, 256, (4, 8, 8, 3)).astype(np.uint8), []

    def count_after(key, images=images):
        """How often features have been computed after they are asked for once more."""
        def compute(images):
            computed.append(key)
            return images.mean(axis=(1, 2))
        found = store.cached_features(compute, images, key)
        assert np.array_equal(found, images.mean(axis=(1, 2)))
        return len(computed)

    assert [count_after("a"), count_after("a")] == [1, 1]
    assert count_after("b") == 2
    other = images.copy()
    other[0, 0, 0, 0] ^= 1
    assert count_after("a", other) == 3
    for file in tmp_path.rglob("*.npz"):
        file.write_bytes(file.read_bytes()[:-5])
    assert [count_after("a"), count_after("a")] == [4, 4]
    monkeypatch.setenv("PRUNING_CACHE", str(next(tmp_path.rglob("*.npz"))))  # a file: no folder can be made there
    assert [count_after("a"), count_after("a")] == [5, 6]


# The sweeps are forked from a process that has imported what the first sweep imported, as imports take longer than
# a sweep. That process runs no torch itself, because torch does not survive a fork after its first work. A sweep
# counts the files that it puts into place, and kills itself before it would put the `fatal`-th there.
FORKS = """
import contextlib, importlib, os, signal, sys
sys.path.insert(0, {root!r})
from pruning import cli, pruning_analysis

def fork(folder, fatal):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    replace, count = os.replace, [0]
    def counting(*paths):
        count[0] += 1
        if count[0] == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)
    os.replace = counting
    cli.run(lambda: pruning_analysis.main([*{flags!r}, folder]))
    with open({report!r}, "w") as file:
        file.write("\\n".join([str(count[0]), *sys.modules]))
    os._exit(0)

assert fork({whole!r}, 0) == 0
count, *modules = open({report!r}).read().split()
for name in modules:
    with contextlib.suppress(Exception):
        importlib.import_module(name)
print(count, flush=True)
for line in sys.stdin:
    print(fork({killed!r}, int(line)), flush=True)
"""


@pytest.mark.parametrize("starts", [2, pytest.param(5, marks=pytest.mark.slow)])  # four kills each
def test_a_sweep_killed_again_and_again_ends_with_the_record_of_an_undisturbed_one(tmp_path, starts):
    code = FORKS.format(root=str(ROOT), flags=[*QUICK, *CHEAP, "--results_dir"], whole=str(tmp_path / "whole"),
                        killed=str(tmp_path / "killed"), report=str(tmp_path / "report"))
    forks = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    whole, record = (tmp_path / name / "shapes-unet/shapes/magnitude.json" for name in ("whole", "killed"))

    def run(fatal=0):
        """Run the sweep until it puts its `fatal`-th file into place, to the end for 0. Returns its exit status."""
        forks.stdin.write(f"{fatal}\n")
        forks.stdin.flush()
        return int(forks.stdout.readline())

    try:
        files = int(forks.stdout.readline())
        assert files > 18 + 3  # images, a record after each point, figures
        for start in np.linspace(1, 0.8 * files, starts).round().astype(int):
            shutil.rmtree(str(record.parent), ignore_errors=True)
            for fatal in (start, 1, 2, 3):  # the runs that continue are killed soon
                status = run(fatal)
                assert status == signal.SIGKILL or (record.exists() and start + fatal > files - 8)
            assert run() == 0
            assert without_times(read_record(record)) == without_times(read_record(whole))
            assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".part", ".lock"))]
    finally:
        forks.stdin.close()
        forks.wait()
