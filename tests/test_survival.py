"""A sweep can be cut off anywhere: no image is made twice, no file stays half-written, the record ends the same."""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pruning import UserError, pruning_analysis
from pruning.models import pipelines
from pruning.records import plots, store
from pruning.records.record import read_record

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["--num_images", "6", "--steps", "2", "--batch_size", "2", "--device", "cpu", "--rates", "0.3", "0.8"]
CHEAP = ["--metrics", "clip_score", "lpips_dense", "fid"]


def sweep(folder, *flags):
    pruning_analysis.main([*QUICK, "--results_dir", str(folder), *flags])
    return read_record(Path(folder) / "shapes-unet" / "shapes" / "magnitude.json")


def without_times(record):
    """All that a record says but for how long things took."""
    data = json.loads(json.dumps(pruning_analysis.asdict(record)))
    for point in (data["dense"], *data["points"]):
        for name in [name for name in point if "seconds" in name]:
            del point[name]
        point["metrics"].pop("generation_time", None)
    return data


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, sweep(folder, *CHEAP)


@pytest.fixture
def made(monkeypatch):
    """How many images each call of the pipeline with all its steps makes, as they come."""
    counts, generate = [], pipelines.generate

    def counting(pipeline, samples, **settings):
        if settings["steps"] > 1:  # which a warm-up has not
            counts.append(len(samples))
        return generate(pipeline, samples, **settings)

    monkeypatch.setattr(pipelines, "generate", counting)
    return counts


def test_a_run_cut_off_between_images_makes_only_those_that_are_missing(tmp_path, made, monkeypatch, whole):
    counting = pipelines.generate

    def cut_off(*args, **settings):
        if len(made) == 5:  # three batches of dense, two at 0.3
            raise KeyboardInterrupt
        return counting(*args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(pipelines, "generate", cut_off)
        with pytest.raises(KeyboardInterrupt):
            sweep(tmp_path, *CHEAP)
    assert made == [2] * 5
    assert without_times(sweep(tmp_path, *CHEAP)) == without_times(whole[1])
    assert made == [2] * 9


def test_a_metric_added_later_makes_no_image_and_is_as_if_measured_at_once(tmp_path, made, whole):
    sweep(tmp_path, "--metrics", "clip_score")
    before = len(made)
    record = sweep(tmp_path, "--metrics", "fid", "lpips_dense")
    assert len(made) == before
    assert without_times(record) == without_times(whole[1])


def test_an_image_of_other_settings_or_a_changed_file_is_not_taken(tmp_path, made):
    sweep(tmp_path, *CHEAP)
    folder = tmp_path / "shapes-unet" / "shapes"
    (folder / "magnitude.json").unlink()
    before = len(made)
    sweep(tmp_path, *CHEAP, "--guidance_scale", "3")
    assert len(made) == before + 9  # all anew
    (folder / "magnitude.json").unlink()
    Image.new("RGB", (64, 64)).save(folder / "images/magnitude/0.3/0001.png")  # without the hash of what made it
    sweep(tmp_path, *CHEAP, "--guidance_scale", "3")
    assert len(made) == before + 9 + 1  # its batch


@pytest.mark.parametrize("damage", [lambda data: data[:len(data) // 2], lambda data: b"", lambda data: os.urandom(500)],
                         ids=["cut", "empty", "garbage"])
@pytest.mark.parametrize("file", ["magnitude.json", "images/magnitude/0.3/0001.png", "images/magnitude/dense/0000.png"])
def test_a_broken_file_is_set_aside_with_a_message_and_measured_again(file, damage, tmp_path, whole, capfd):
    shutil.copytree(str(whole[0] / "shapes-unet"), str(tmp_path / "shapes-unet"))
    path = tmp_path / "shapes-unet" / "shapes" / file
    broken = damage(path.read_bytes())
    path.write_bytes(broken)
    if file.endswith("png"):  # or nothing would look at it
        (tmp_path / "shapes-unet/shapes/magnitude.json").unlink()
    assert without_times(sweep(tmp_path, *CHEAP)) == without_times(whole[1])
    aside = path.with_name(path.name + ".broken")
    assert aside.read_bytes() == broken
    said = capfd.readouterr()
    assert aside.name in said.err + said.out


def test_discarded_images_leave_those_of_the_figure_and_are_made_again_when_needed(tmp_path, made, whole):
    flags = ["--num_images", str(plots.ROWS + 2)]
    discarded = sweep(tmp_path, "--metrics", "clip_score", "--discard_images", *flags)
    files = sorted(path.name for path in (tmp_path / "shapes-unet/shapes/images/magnitude/0.3").iterdir())
    assert files == [store.file_name(index) for index in range(plots.ROWS)]
    before = len(made)
    record = sweep(tmp_path, *CHEAP, *flags)
    assert len(made) == before + 3  # the last batch of dense and both rates
    assert record.points[1].per_image["clip_score"] == discarded.points[1].per_image["clip_score"]


def test_a_second_process_on_the_same_record_is_turned_away(tmp_path):
    path = tmp_path / "shapes-unet" / "shapes" / "magnitude.json"
    with store.only_writer(path):
        with pytest.raises(UserError, match="another process is writing"):
            sweep(tmp_path, *CHEAP)
        code = f"from pruning import kept; from pathlib import Path\nwith store.only_writer(Path({str(path)!r})): pass"
        other = subprocess.run([sys.executable, "-c", code], cwd=str(ROOT), capture_output=True, text=True)
        assert "another process is writing" in other.stderr
    assert list(path.parent.iterdir()) == []


def test_results_that_cannot_be_written_are_one_line_before_anything_is_measured(tmp_path, made):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write into"):
        sweep(tmp_path / "file", *CHEAP)
    (tmp_path / "folder").mkdir(mode=0o500)
    if not os.access(str(tmp_path / "folder"), os.W_OK):  # which root always may
        with pytest.raises(UserError, match="cannot write into"):
            sweep(tmp_path / "folder", *CHEAP)
    assert not made


@pytest.mark.parametrize(("limit", "first"), [(2000, "0000.png"), (9000, "magnitude_images.png")])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(limit, first, tmp_path, whole):
    """A limit on the size of files, beyond which the system refuses to write as it does on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(UserError, match=f"cannot write .*{first}"):
            sweep(tmp_path, *CHEAP)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix not in (".png", ".json")]
    assert without_times(sweep(tmp_path, *CHEAP)) == without_times(whole[1])


def test_features_of_real_images_are_computed_once_and_again_where_anything_differs(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path))
    images, computed = np.random.RandomState(0).randint(0, 256, (4, 8, 8, 3)).astype(np.uint8), []

    def features(images=images, **origin):
        def compute(images):
            computed.append(origin)
            return images.mean(axis=(1, 2))
        found = store.features(compute, images, origin)
        assert np.array_equal(found, images.mean(axis=(1, 2)))
        return len(computed)

    assert [features(weights="a"), features(weights="a")] == [1, 1]
    assert features(weights="b") == 2
    other = images.copy()
    other[0, 0, 0, 0] ^= 1
    assert features(other, weights="a") == 3
    for file in tmp_path.rglob("*.npy"):
        file.write_bytes(file.read_bytes()[:-5])
    assert [features(weights="a"), features(weights="a")] == [4, 4]
    monkeypatch.setenv("PRUNING_CACHE", str(next(tmp_path.rglob("*.npy"))))  # where no folder can be made
    assert [features(weights="a"), features(weights="a")] == [5, 6]


# A process for sweeps to fork from that has imported what the first one did, which takes longer than to sweep. It runs
# nothing itself, as torch does not bear a fork once it has worked.
ZYGOTE = """
import contextlib, importlib, os, sys
sys.path.insert(0, {root!r})
from pruning import cli, pruning_analysis

def fork(folder):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        cli.run(lambda: pruning_analysis.main([*{flags!r}, folder]))
        with open({modules!r}, "w") as file:
            file.write("\\n".join(sys.modules))
        os._exit(0)
    return child

os.waitpid(fork({whole!r}), 0)
for name in open({modules!r}).read().split():
    with contextlib.suppress(Exception):
        importlib.import_module(name)
print("ready", flush=True)
for line in sys.stdin:
    child = fork({killed!r})
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_a_sweep_killed_at_20_moments_ends_with_the_record_of_an_undisturbed_one(tmp_path):
    code = ZYGOTE.format(root=str(ROOT), flags=[*QUICK, *CHEAP, "--results_dir"], whole=str(tmp_path / "whole"),
                         killed=str(tmp_path / "killed"), modules=str(tmp_path / "modules"))
    zygote = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    whole, record = (tmp_path / name / "shapes-unet/shapes/magnitude.json" for name in ("whole", "killed"))
    met, rng = set(), np.random.RandomState(0)

    def images():
        return len(list((record.parent / "images").rglob("0*.png")))

    def run(seconds=None, more=0):
        """Start a sweep, kill it so many seconds after it made so many images more; its status, and how long it ran."""
        there = images()
        zygote.stdin.write("\n")
        zygote.stdin.flush()
        child, started = int(zygote.stdout.readline()), time.monotonic()
        if seconds is not None:
            while images() < there + more and time.monotonic() < started + span:
                time.sleep(0.001)
            time.sleep(seconds)
            with suppress(ProcessLookupError):  # where it was sooner
                os.kill(child, signal.SIGKILL)
        return int(zygote.stdout.readline()), time.monotonic() - started

    try:
        assert zygote.stdout.readline() == "ready\n"
        status, span = run()
        assert status == 0
        killed = 0
        for _ in range(60):
            if killed == 20:
                break
            if rng.rand() < 0.4:  # begin again from nothing, as a longer sweep would have more to do
                shutil.rmtree(str(record.parent), ignore_errors=True)
            # Any moment, or one of those while images are made, which are but a small part of all.
            status, _ = run(rng.uniform(0, span)) if rng.rand() < 0.5 else run(rng.uniform(0, 0.1), rng.randint(1, 12))
            killed += os.WIFSIGNALED(status)
            met.add((images(), record.exists()))
        assert killed == 20
        assert len(met) > 4  # moments that differ: before the first image, between images, between points, at the end
        assert run()[0] == 0
    finally:
        zygote.stdin.close()
        zygote.wait()
    assert without_times(read_record(record)) == without_times(read_record(whole))
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".part", ".lock"))]
