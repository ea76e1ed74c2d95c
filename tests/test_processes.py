"""Several processes make the images that one process makes, and a process that dies ends the others."""
from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from pruning import cli, distributed, experiment, merge_results, pruning_analysis, steps, sweep
from pruning.records.record import read_record

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["--num_images", "6", "--steps", "2", "--batch_size", "2", "--device", "cpu", "--rates", "0.5"]
# All processes calibrate, one prunes, all train.
CALIBRATED = ("--method", "structured", "--calibration_images", "4", "--recovery_steps", "2")
VARIANT = "structured+recovery_steps=2+calibration_images=4"


def launch(processes, *flags):
    """Start the command in so many processes of this machine. accelerate's own --cpu would start only one."""
    with socket.socket() as found:  # a free port: older releases hang at port 0
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_LOG_LEVEL": "error"}
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes),
         "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port),
         str(ROOT / "pruning" / "pruning_analysis.py"), *QUICK, *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=str(ROOT))


def workers(launcher):
    """The processes that run the command below a launcher."""
    with suppress(psutil.NoSuchProcess):
        return [child.pid for child in psutil.Process(launcher.pid).children()
                if str(ROOT / "pruning" / "pruning_analysis.py") in child.cmdline()]
    return []


def finished(processes, *flags):
    """Launch, wait for the end, check the number of processes, and return what they printed."""
    running, met, ends = launch(processes, *flags), set(), time.monotonic() + 300
    while running.returncode is None:
        if time.monotonic() > ends:
            for pid in (*workers(running), running.pid):
                os.kill(pid, signal.SIGKILL)
        met.update(workers(running))
        with suppress(subprocess.TimeoutExpired):
            out, err = running.communicate(timeout=0.5)
    assert running.returncode == 0, err
    assert len(met) == processes
    return out


def record_and_images(folder, method):
    own = folder / "shapes-unet" / "shapes"
    files = sorted((own / "images" / method).rglob("*.png"))
    return read_record(own / f"{method}.json"), {
        str(file.relative_to(own)): np.asarray(Image.open(file)).astype(int) for file in files}


def assert_alike(one, several):
    """Images are at most a grey level apart, because thread counts differ, and metrics agree to 1e-3.

    So do the values of single images, each with its own image; peaks of nearly equal images are far apart.
    """
    (record, images), (other, others) = one, several
    assert images.keys() == others.keys()
    assert len(images) == 2 * len(record.samples)
    assert max(abs(images[name] - others[name]).max() for name in images) <= 1
    for a, b in zip((record.dense, *record.points), (other.dense, *other.points)):
        for name, value in a.metrics.items():
            if name not in ("generation_time", "psnr_dense"):
                assert b.metrics[name] == pytest.approx(value, rel=1e-3, abs=2e-3), name
                assert b.per_image.get(name, []) == pytest.approx(a.per_image.get(name, []), rel=5e-3, abs=5e-3), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    pruning_analysis.main([*QUICK, "--results_dir", str(folder), *CALIBRATED])
    return record_and_images(folder, VARIANT)


def test_each_process_measures_the_images_of_its_own_batches(tmp_path, monkeypatch):
    flags = cli.Parser("")
    cli.add_measuring_flags(flags)
    args = flags.parse_args([*QUICK[2:-2], "--metrics", "clip_score", "lpips_dense", "fid"])
    args.num_images, args.results_dir, args.rates = 5, tmp_path, [0.5]
    made = experiment.prepare(args, sweep.own_path(args), None)
    steps.make_images(made, 0.0)
    parts = []

    def measurements(features, rows, pixels, dense_pixels):
        return {"clip_score": lambda: np.array(rows), "lpips_dense": lambda: pixels.mean((1, 2, 3))}

    def measured():
        return steps.measure_images(made, measurements, ["clip_score", "fid", "lpips_dense"], 0.0, range(5), range(5))

    one = measured()
    monkeypatch.setattr(distributed, "world_size", 2)
    monkeypatch.setattr(distributed, "collect", lambda items: parts.extend(items) or parts[:2 * distributed.rank])
    for process in range(2):
        monkeypatch.setattr(distributed, "rank", process)
        several = measured()
    assert [list(values["clip_score"]) for values, _ in parts] == [[0, 1, 4], [2, 3]]
    for numbers, others in zip(one, several):
        assert numbers.keys() == others.keys()
        for name in numbers:
            assert others[name] == pytest.approx(numbers[name], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_make_the_record_that_one_makes(processes, alone, tmp_path):
    out = finished(processes, *CALIBRATED, "--results_dir", str(tmp_path))
    assert out.count("How far?") == 1  # by one process
    assert_alike(alone, record_and_images(tmp_path, VARIANT))


@pytest.mark.slow
def test_more_processes_than_batches_are_no_harm(tmp_path):
    """Three processes and one batch, of six."""
    flags = [*CALIBRATED, "--batch_size", "6"]
    pruning_analysis.main([*QUICK, *flags, "--results_dir", str(tmp_path / "one")])
    finished(3, *flags, "--results_dir", str(tmp_path / "three"))
    assert_alike(record_and_images(tmp_path / "one", VARIANT), record_and_images(tmp_path / "three", VARIANT))


@pytest.mark.slow
def test_what_is_trained_is_the_same_in_all_processes(tmp_path):
    flags = ["--method", "iterative", "--recovery_steps", "2", "--metrics", "lpips_dense", "--rates", "0.2"]
    pruning_analysis.main([*QUICK, *flags, "--results_dir", str(tmp_path / "one")])
    finished(2, *flags, "--results_dir", str(tmp_path / "two"))
    assert_alike(*(record_and_images(tmp_path / each, "iterative+recovery_steps=2") for each in ("one", "two")))


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_with_a_message_and_the_next_start_goes_on(tmp_path):
    longer = [*CALIBRATED, "--num_images", "24", "--steps", "6"]  # so that it is not over before the kill
    flags = [*longer, "--results_dir", str(tmp_path / "killed")]
    running = launch(2, *flags)
    for _ in range(6000):  # until the first images are there
        if list(tmp_path.rglob("0*.png")):
            break
        time.sleep(0.01)
    first, second = sorted(workers(running))
    os.kill(second, signal.SIGKILL)
    _, err = running.communicate(timeout=60)
    assert running.returncode != 0
    assert str(second) in err
    assert not psutil.pid_exists(first)
    finished(2, *flags)
    pruning_analysis.main([*QUICK, *longer, "--results_dir", str(tmp_path / "alone")])
    assert_alike(*(record_and_images(tmp_path / name, VARIANT) for name in ("alone", "killed")))


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_others_without_a_traceback_of_theirs(tmp_path):
    flags = ["--dataset", "coco", "--data_dir", str(tmp_path / "nowhere"), "--results_dir", str(tmp_path / "results")]
    running = launch(2, *flags)
    _, err = running.communicate(timeout=60)
    assert running.returncode != 0
    assert [line for line in err.splitlines() if line.startswith("error:") and "nowhere" in line]
    assert "[rank1]" not in err  # which torch writes before each line of a traceback
    assert not (tmp_path / "results").exists()


def test_shards_share_out_the_rates_and_are_one_record_when_merged(tmp_path):
    flags = [*QUICK[:-2], "--metrics", "clip_score", "lpips_dense", "--rates", "0.2", "0.5", "0.8"]
    pruning_analysis.main([*flags, "--results_dir", str(tmp_path / "whole")])
    for part in ("1/2", "2/2"):
        pruning_analysis.main([*flags, "--results_dir", str(tmp_path / "parts"), "--shard", part])
    merge_results.main(["--results_dir", str(tmp_path / "parts")])
    whole, parts = (read_record(tmp_path / name / "shapes-unet/shapes/magnitude.json") for name in ("whole", "parts"))
    assert [point.rate for point in parts.points] == [0.2, 0.5, 0.8]
    assert [p.per_image for p in parts.points] == [p.per_image for p in whole.points]
    assert not list((tmp_path / "parts").rglob("*of2.json"))
