"""The commands end to end on the bundled model, with few images and steps."""
import contextlib
import copy
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path
from types import SimpleNamespace

import accelerate
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from test_data import flickr8k_folder

from pruning import UserError, cli, data, experiment, originals, pruning_analysis, steps, sweep, test_single_rate
from pruning.data.faults import sentences
from pruning.methods import (
    METHODS,
    PRUNING,
    calibration,
    default_options,
    needs,
    probes,
    prune,
    reconstruct,
    recovery,
    sequential,
    units,
)
from pruning.metrics import DEFAULT, METRICS, backbones, costs, scores
from pruning.models import generation, pipelines
from pruning.records import drawing, plots, store, summaries
from pruning.records.record import read_record, write_record

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["--num_images", "4", "--steps", "4", "--batch_size", "4", "--device", "cpu"]
RATES = ["--rates", "0.3", "0.8"]
PAIRS = ["--metrics", "clip_score", "lpips", "lpips_dense", "psnr_dense"]
FEW_CALLS = ["--calibration_images", "4"]


def measure(folder, *flags):
    """Run the command in this process and return the record that it wrote."""
    pruning_analysis.main([*QUICK, "--results_dir", str(folder), *flags])
    return next(read_record(path) for path in sorted(Path(folder).glob("*/*/*.json")))


def fails(capsys, main, *flags, said=0):
    """The one line on stderr, after `said` others, with which a command exits with 2. Checks that it is one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: main([str(flag) for flag in flags]))
    lines = [line for line in capsys.readouterr().err.splitlines() if "it/s" not in line and line.strip()]
    assert stop.value.code == 2
    assert len(lines) == said + 1, lines
    return lines[-1]


def measurements(record):
    """Everything measured except times, as one list of numbers."""
    numbers = []
    for point in [record.dense, *record.points]:
        numbers += [point.rate, point.sparsity, point.units_taken, point.parameters, point.nonzero_parameters]
        numbers += [value or 0 for name, value in sorted(point.metrics.items()) if name != "generation_time"]
        numbers += [value or 0 for _, values in sorted(point.per_image.items()) for value in values]
    return numbers


@pytest.fixture(scope="module", params=[name for name in PRUNING if name not in ("blocks", "joint", "modulation")])
def measured(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    flags = ["--recovery_steps", "1"] if request.param == "iterative" else []
    if needs(request.param, {}):
        flags += FEW_CALLS
    with pytest.MonkeyPatch.context() as patch:  # fewer steps and probes, which take less time
        patch.setattr(reconstruct, "SHARE", 0.8)
        patch.setattr(reconstruct, "SURVEY_SHARE", 0.8)
        patch.setattr(sequential, "CALLS", 1)
        patch.setattr(units, "CALLS", 1)
        patch.setattr(reconstruct, "ITERATIONS", 1)
        patch.setattr(probes, "PROBES", 1)
        return measure(folder, "--method", request.param, *RATES, *flags), folder


def test_a_sweep_reaches_the_rates_asked_and_changes_the_images_ever_more(measured):
    record, _ = measured
    assert [point.rate for point in record.points] == [0.3, 0.8]
    for point in record.points:
        assert point.units_asked == round(point.rate * point.units_total)
        assert point.units_taken == point.units_asked
        assert point.sparsity == pytest.approx(point.rate, abs=0.01)
        assert point.nonzero_parameters < record.dense.nonzero_parameters
    mild, harsh = (point.metrics["lpips_dense"] for point in record.points)
    assert 0 < mild < harsh
    assert record.dense.metrics["lpips_dense"] == 0


def test_removal_shrinks_parameters_and_masks_do_not(measured):
    record, _ = measured
    parameters = [point.parameters for point in [record.dense, *record.points]]
    if METHODS[record.method].removes:
        assert parameters[0] > parameters[1] > parameters[2]
    else:
        assert len(set(parameters)) == 1


def test_costs_fall_with_removal_and_masks_cost_what_dense_does(measured):
    record, _ = measured
    points = [record.dense, *record.points]
    for cost in ("macs", "weight_bytes", "peak_bytes"):
        values = [getattr(point, cost) for point in points]
        if METHODS[record.method].removes:
            assert values[0] > values[1] > values[2] > 0
        else:
            assert len(set(values)) == 1
    assert record.dense.macs == 219_125_760  # torch counts so many for one latent of the bundled UNet


def test_a_record_says_what_each_layer_lost_and_its_share_of_the_model(measured):
    record, _ = measured
    parameters, macs = record.dense.layer_parameters, record.dense.layer_macs
    assert set(parameters) == set(macs)
    assert sum(macs.values()) == pytest.approx(1)
    assert 0.98 < sum(parameters.values()) <= 1  # norms and embeddings are no layers
    for point in record.points:
        assert all(0 <= rate <= 1 for rate in point.layer_rates.values())
        if point.unit == "weights":
            lost = sum(parameters[name] * rate for name, rate in point.layer_rates.items()) / sum(parameters.values())
            assert lost == pytest.approx(point.sparsity, abs=0.01)  # a layer's parameters include its biases
        assert set(point.layer_errors) == (set(point.layer_rates) if "moments" in needs(record.method, {}) else set())
    rates, errors = ([sum(getattr(point, name).values()) for point in record.points]
                     for name in ("layer_rates", "layer_errors"))
    assert 0 < rates[0] < rates[1]
    assert errors == [0, 0] or 0 < errors[0] < errors[1]


def prepare(folder, *flags, earlier=None, count=2):
    """The experiment of these flags and `count` images, as the command makes it. earlier: the record it continues."""
    parser = cli.Parser("")
    cli.add_measuring_flags(parser)
    args = parser.parse_args([*QUICK[2:], *flags])
    args.num_images, args.results_dir, args.rates = count, folder, [0.5]
    return experiment.prepare(args, sweep.own_path(args), earlier)


@pytest.mark.parametrize("method", ["structured", "blocks"])
def test_offloading_changes_no_image_and_no_count(tmp_path, monkeypatch, method):
    """The command refuses --offload on the CPU, but the hooks of accelerate and diffusers work there too."""
    align = accelerate.hooks.AlignDevicesHook.__init__

    def on_cpu(self, *args, **options):  # diffusers says cpu:0, and to torch that is another device than a tensor's
        align(self, *args, **{**options, "execution_device": torch.device("cpu")})

    monkeypatch.setattr(accelerate.hooks.AlignDevicesHook, "__init__", on_cpu)
    seen = {}
    for choice in (None, "model", "sequential"):
        made = prepare(tmp_path / str(choice), "--method", method, "--metrics", "lpips_dense",
                       "--calibration_images", "4")
        made = dataclasses.replace(made, offload=choice)
        dense = pruning_analysis.run_pruning_experiment(made, 0.0)
        folder = tmp_path / f"{choice}-pruned"
        point = pruning_analysis.run_pruning_experiment(made, 0.5, dense, save_to=folder)
        seen[choice] = (point.metrics["lpips_dense"], point.macs, point.parameters)
        assert pipelines.load_pipeline(str(folder)).unet.num_parameters() == point.parameters
    assert seen[None] == seen["model"] == seen["sequential"]


def test_a_larger_batch_leaves_methods_the_same_calls_to_calibrate_on(tmp_path, monkeypatch):
    made = []
    for size in ("8", "9"):
        monkeypatch.setenv("PRUNING_CACHE", str(tmp_path / size))
        made.append(prepare(tmp_path, "--method", "structured", "--metrics", "lpips_dense", "--calibration_images", "9",
                            "--steps", "2", "--batch_size", size).calibration)
    few, many = made
    assert [len(output) for _, output in many.calls] == [16, 16, 2, 2]  # 8 images and 1, in 2 steps, guided
    assert all(bool((a == b).all()) for (_, a), (_, b) in zip(few.calls, many.calls))
    assert few.guidance == many.guidance != 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recovery_learns_from_what_the_pruned_denoiser_draws_and_what_dense_says_to_it(tmp_path, monkeypatch, dtype):
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path))
    made = prepare(tmp_path, "--method", "structured", "--recovery_steps", "1", *FEW_CALLS, "--metrics", "lpips_dense",
                   "--dtype", dtype)
    denoiser, known = copy.deepcopy(made.dense), made.calibration
    prune("magnitude", denoiser, 0.7)
    before = copy.deepcopy(denoiser)
    pipelines.set_denoiser(made.pipeline, before)
    drawn = generation.record_calls(made.pipeline, made.training, **made.sampling)
    with recovery.full_precision(denoiser, {}):
        with known.visited(denoiser, 0) as calls:
            assert list(known.folder.glob("visit-*.pt"))
            for (arguments, target), (own, answered), (of_dense, _) in zip(calls, drawn, known.calls):
                assert torch.equal(arguments["sample"], own["sample"])
                assert torch.equal(target, calibration.answer(made.dense, arguments))
                assert not torch.equal(target, answered)
                noise = int(arguments["timestep"]) == int(calls[0][0]["timestep"])
                assert torch.equal(arguments["sample"], of_dense["sample"]) is noise  # of the same captions and noise
            assert len(calls) == len(drawn) == 4
        with known.visited(denoiser, 1) as others:
            assert not torch.equal(others[0][0]["sample"], calls[0][0]["sample"])
    assert not list(known.folder.glob("visit-*.pt"))
    with known.dense("cpu") as dense:
        assert dense is made.dense
    monkeypatch.setattr(pipelines, "lent_to", lambda *_: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("full")))
    with pytest.raises(UserError, match="cpu has no memory for the dense denoiser beside the one that recovers"), \
            known.dense("cpu"):
        pass
    assert all(torch.equal(*pair) for pair in zip(denoiser.state_dict().values(), before.state_dict().values()))


def test_an_offloaded_denoiser_stays_on_the_device_from_batch_to_batch(tmp_path, monkeypatch):
    made = prepare(tmp_path, "--batch_size", "1", "--metrics", "lpips_dense", count=3)
    made = dataclasses.replace(made, offload="model")
    denoiser, _ = steps.prune_copy(made, 0.0)
    hooks = {name: getattr(made.pipeline, name)._hf_hook.prev_module_hook for name in ("unet", "text_encoder", "vae")}
    assert hooks["unet"].model is made.pipeline.text_encoder  # which waits again while the denoiser runs
    assert hooks["text_encoder"].model is denoiser
    assert hooks["vae"] is None
    steps.make_images(made, 0.0)  # encodes the prompts
    moved = []
    monkeypatch.setattr(accelerate.hooks.CpuOffload, "init_hook", lambda _, module: moved.append(module) or module)
    steps.make_images(made, 0.5)
    assert [module for module in moved if module is not made.pipeline.text_encoder] == []


@pytest.mark.parametrize("offload", [None, "model"])
def test_denoisers_that_do_not_fit_together_are_timed_in_turns(tmp_path, offload, capsys):
    made = dataclasses.replace(prepare(tmp_path, "--metrics", "lpips_dense"), offload=offload)
    denoiser, _ = steps.prune_copy(made, 0.5)
    before = {name: tensor.clone() for name, tensor in made.dense.state_dict().items()}
    calls = []

    def full(module, _):
        calls.append(module)
        if len(calls) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    for module in (made.dense, denoiser):
        module.register_forward_pre_hook(full)
    _ = made.batch_call
    calls.clear()
    times = steps.time_calls(made, denoiser, 0.5, steps.Images(np.ones(2, bool), 1.0, 2))
    assert "in turns" in capsys.readouterr().out
    assert [module is denoiser for module in calls[1:9]] == [False, False, True, True] * 2  # each is warmed up
    assert all(seconds > 0 for seconds in (times["denoiser_seconds"], times["dense_denoiser_seconds"]))
    assert made.pipeline.unet is denoiser
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.dense.state_dict().items())


@pytest.mark.parametrize(("method", "timings"), [("magnitude", 1), ("structured", 2)])
def test_rates_that_do_the_same_work_are_timed_once(tmp_path, monkeypatch, method, timings):
    made = prepare(tmp_path, "--method", method, "--metrics", "lpips_dense", "--calibration_images", "2")
    seen, ratio = [], costs.time_ratio
    monkeypatch.setattr(costs, "time_ratio", lambda *args, **options: seen.append(args) or ratio(*args, **options))
    for rate in (0.3, 0.6):
        denoiser, _ = steps.prune_copy(made, rate)
        times = steps.time_calls(made, denoiser, rate, steps.Images(np.ones(2, bool), 1.0, 2))
        assert 0 < times["ratio_intervals"]["denoiser_seconds"][0] <= times["ratio_intervals"]["denoiser_seconds"][1]
    assert len(seen) == timings


def test_an_experiment_is_not_assigned_to_after_it_was_made(tmp_path):
    made = prepare(tmp_path, "--metrics", "lpips_dense")
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.offload = "model"


def test_a_run_that_continues_counts_the_denoisers_calls_as_a_fresh_one(tmp_path):
    """PNDM calls the denoiser once more than it has steps, and the dense image time depends on these calls."""
    shutil.copytree(pipelines.MODELS["shapes-unet"].folder, tmp_path / "pndm")
    index = tmp_path / "pndm" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "scheduler": ["diffusers", "PNDMScheduler"]}))
    config = tmp_path / "pndm" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "PNDMScheduler",
                                  "skip_prk_steps": True}))
    flags = ["--model", str(tmp_path / "pndm"), "--metrics", "lpips_dense"]
    fresh, again = prepare(tmp_path, *flags), prepare(tmp_path, *flags)
    steps.prune_copy(fresh, 0.5)
    made, read = steps.make_images(fresh, 0.5), steps.load_images(again, 0.5)
    assert made.calls == read.calls == 4 + 1
    denoiser, _ = steps.prune_copy(again, 0.5)
    steps.count_costs(again, denoiser, 0.5)
    times = steps.time_calls(again, denoiser, 0.5, read._replace(seconds_each=1.0))
    in_calls = min(1, 5 * times["denoiser_seconds"] / 2)
    expected = 1 - in_calls + in_calls * times["dense_denoiser_seconds"] / times["denoiser_seconds"]
    assert times["dense_image_seconds"] == pytest.approx(expected)


def test_a_dense_model_measured_again_takes_as_long_as_itself(tmp_path):
    measure(tmp_path, "--rates", "0.3", "--metrics", "lpips_dense")
    shutil.rmtree(tmp_path / "shapes-unet/shapes/images/magnitude/dense")
    dense = measure(tmp_path, "--rates", "0.3", "0.8", "--metrics", "lpips_dense").dense
    assert dense.denoiser_seconds == dense.dense_denoiser_seconds
    assert dense.image_seconds == dense.dense_image_seconds


def test_rates_that_differ_little_have_images_of_their_own(tmp_path):
    record = measure(tmp_path, "--rates", "0.3", "0.30001", "--metrics", "lpips_dense")
    assert [point.rate for point in record.points] == [0.3, 0.30001]
    folders = (tmp_path / "shapes-unet/shapes/images/magnitude").iterdir()
    assert {path.name for path in folders} == {"dense", "0.3", "0.30001"}


def test_every_promised_file_is_there_and_no_other(measured):
    record, folder = measured
    own = folder / record.model / record.dataset
    ends = (".json", ".png", "_metrics.png", "_cost.png", "_images.png", "_layers.png", ".txt")
    ends += tuple(end.replace(".png", ".svg") for end in ends if end.endswith(".png") and end != "_images.png")
    promised = {"report.html", "results.csv", *(f"{record.variant}{end}" for end in ends)}
    assert {path.name for path in own.iterdir() if path.is_file()} == promised
    assert not list(folder.rglob("*.part"))
    for path in own.glob("*.png"):
        Image.open(path).verify()


def test_per_image_values_are_behind_the_means(measured):
    record, _ = measured
    for point in [record.dense, *record.points]:
        for name, values in point.per_image.items():
            assert len(values) == len(record.samples) == 4
            if None not in values:  # equal images have no finite psnr
                assert np.mean(values) == pytest.approx(point.metrics[name], rel=1e-6, abs=1e-9)
            else:
                assert (name, point.metrics[name]) == ("psnr_dense", None)
        assert set(point.per_image) == {name for name in DEFAULT if METRICS[name].per_image}


def test_scores_are_those_of_the_images_on_disk(measured):
    record, folder = measured
    own = folder / record.model / record.dataset / "images" / record.variant / "0.3"
    images = np.stack([np.asarray(Image.open(path)) for path in sorted(own.iterdir())])
    clip = backbones.load_backbone("bundled", "clip")
    texts, _ = backbones.embed_captions(clip, [sample["caption"] for sample in record.samples])
    measured_again = scores.clip_score(backbones.embed_images(clip, images), texts)
    assert measured_again == pytest.approx(record.points[0].per_image["clip_score"], abs=1e-3)


def test_a_sweep_cut_off_goes_on_and_ends_like_an_undisturbed_one(tmp_path, monkeypatch):
    whole = measure(tmp_path / "whole", *RATES)
    run = pruning_analysis.run_pruning_experiment

    def cut_off(experiment, rate, *args):
        if rate == 0.8:
            raise KeyboardInterrupt
        return run(experiment, rate, *args)

    monkeypatch.setattr(pruning_analysis, "run_pruning_experiment", cut_off)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path / "cut", *RATES)
    kept = read_record(tmp_path / "cut" / "shapes-unet" / "shapes" / "magnitude.json")
    assert [point.rate for point in kept.points] == [0.3]
    assert (tmp_path / "cut" / "shapes-unet" / "shapes" / "magnitude.png").exists()

    measured = []
    monkeypatch.setattr(pruning_analysis, "run_pruning_experiment",
                        lambda experiment, rate, *args: measured.append(rate) or run(experiment, rate, *args))
    resumed = measure(tmp_path / "cut", *RATES)
    assert measurements(resumed) == pytest.approx(measurements(whole), rel=1e-4, abs=1e-6)
    assert (resumed.settings, resumed.samples, resumed.notes) == (whole.settings, whole.samples, whole.notes)
    assert measured == [0.8]


def test_a_record_of_other_settings_is_refused_with_the_difference_named(tmp_path, capsys):
    flags = [*QUICK, "--rates", "0.3", "--results_dir", str(tmp_path)]
    pruning_analysis.main(flags)
    line = fails(capsys, pruning_analysis.main, *flags, "--steps", "5", "--seed", "1")
    assert "steps: 4 and 5" in line
    assert "seed: 0 and 1" in line
    pruning_analysis.main([*flags, "--steps", "5", "--overwrite"])
    assert read_record(tmp_path / "shapes-unet" / "shapes" / "magnitude.json").settings["steps"] == 5


LOST_CAPTION = "Captions skipped because they are empty: 1 (line 32)."
LOST_LINE = "Lines skipped that are no comma-separated values, such as those with an open quote: 1 (line 33)."
CUT = "Captions cut where CLIP stops reading: 1 (2_ab.jpg)."


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A sweep over a folder of photographs with faulty captions: its flags, what it printed, the record's path."""
    folder = tmp_path_factory.mktemp("photos")
    flickr8k_folder(folder / "flickr8k", "kaggle", '7.jpg,\n8.jpg,"A dog\n')
    captions = folder / "flickr8k" / "captions.txt"
    captions.write_text(captions.read_text().replace("number 20", 40 * "very "))
    flags = ["--dataset", "flickr8k", "--data_dir", str(folder / "flickr8k"), "--model", "shapes-unet",
             "--metric_backbones", "bundled", "--num_images", "3", "--steps", "1", "--metrics", "clip_score", "fid",
             "--rates", "0.5", "--device", "cpu", "--results_dir", str(folder)]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        pruning_analysis.main(flags)
    return flags, said.getvalue(), folder / "shapes-unet" / "flickr8k" / "magnitude.json"


def test_what_is_skipped_or_cut_in_the_data_is_on_the_screen_in_the_record_and_in_the_summary(photos):
    _, said, path = photos
    summary = " ".join(path.with_suffix(".txt").read_text(encoding="utf-8").split())
    assert sentences(read_record(path).notes.faults) == [LOST_CAPTION, LOST_LINE, CUT]
    for sentence in (LOST_CAPTION, LOST_LINE, CUT):
        assert said.count(sentence) == summary.count(sentence) == 1


def test_a_sweep_does_not_go_on_if_a_real_image_beyond_the_measured_ones_has_changed(photos, capsys):
    flags, _, path = photos
    measured = {sample["id"] for sample in read_record(path).samples}
    other = next(file for file in Path(flags[3], "Images").iterdir() if file.name not in measured)
    Image.new("RGB", (24, 16), "white").save(other)
    line = fails(capsys, pruning_analysis.main, *flags, "--rates", "0.6", said=3)
    assert re.search(r"measured with other settings \(other_originals: \w{32} and \w{32}\)", line)


def test_a_record_that_does_not_know_its_real_images_goes_on_and_still_says_so(photos, tmp_path):
    flags = [*photos[0][:8], "--metrics", "fid"]  # the data set and its networks
    record = prepare(tmp_path, *flags).record
    unknown = {"reference_originals": "unknown", "other_originals": "unknown"}  # as a record of version 8 is read
    known = {name: record.settings[name] for name in unknown}
    assert all(re.fullmatch("[0-9a-f]{32}", value) for value in known.values())
    for hashes in (known, unknown):
        earlier = dataclasses.replace(record, settings={**record.settings, **hashes})
        assert prepare(tmp_path, *flags, earlier=earlier).record.settings == earlier.settings


def test_the_hash_of_real_images_changes_with_each_of_them(monkeypatch):
    monkeypatch.setattr(originals, "REFERENCE_ROWS", 2)
    network = backbones.load_backbone("bundled", "features")

    def describe(images):
        samples = [data.Sample(str(n), "", image.copy) for n, image in enumerate(images)]
        return originals.describe({"features": network}, {"features": "x"}, {}, "cpu", 64, samples)

    images = [Image.new("RGB", (64, 64), (n, 80, 160)) for n in range(5)]
    found, digest = describe(images)
    expected = backbones.describe("features", network, np.stack([np.asarray(image) for image in images]))
    assert np.abs(found["features"] - expected).max() < 1e-4
    digests = {digest}
    for image in images:
        image.putpixel((3, 3), (255, 255, 255))
        digests.add(describe(images)[1])
    assert len(digests) == 6
    assert describe([]) == ({}, "none")


def test_settings_of_a_method_that_differ_have_records_of_their_own_and_share_the_dense_images(tmp_path, capsys):
    def sweep_by(*flags):
        pruning_analysis.main([*QUICK, *flags, "--rates", "0.3", "--metrics", "lpips_dense", "--results_dir",
                               str(tmp_path)])
        return "4 images of the dense model are taken from other sweeps" in capsys.readouterr().err

    own = tmp_path / "shapes-unet" / "shapes"
    dense = [own / "images" / name / "dense/0002.png" for name in ("magnitude", "magnitude+scope=global")]
    assert [sweep_by(), sweep_by("--scope", "global")] == [False, True]
    layer, whole = (read_record(own / f"{name}.json") for name in ("magnitude", "magnitude+scope=global"))
    assert layer.options == default_options("magnitude")
    assert whole.options == {**layer.options, "scope": "global"}
    assert layer.points[0].metrics != whole.points[0].metrics
    assert layer.dense.image_seconds == whole.dense.image_seconds
    assert dense[0].read_bytes() == dense[1].read_bytes()
    assert not sweep_by("--scope", "global", "--overwrite")  # which asks for new images
    assert dense[0].read_bytes() != dense[1].read_bytes()  # their times differ
    with pytest.raises(UserError, match="seed"):
        sweep_by("--seed", "1")
    shutil.rmtree(own / "images/magnitude+scope=global")
    (own / "magnitude+scope=global.json").unlink()
    assert not sweep_by("--scope", "global", "--seed", "1")  # other noise


def test_a_single_rate_equals_the_same_rate_of_an_iterative_sweep(tmp_path, capsys):
    flags = ["--method", "iterative", "--recovery_steps", "2", *FEW_CALLS, "--metrics", "clip_score"]
    swept = measure(tmp_path / "sweep", *flags, "--rates", "0.1", "0.2", "0.3")
    test_single_rate.main([*QUICK, *flags, "--rate", "0.3", "--results_dir", str(tmp_path / "single")])
    single = read_record(next((tmp_path / "single").glob("*/*/*.json")))
    assert single.points[0].per_image == swept.points[2].per_image
    assert "iterative+recovery_steps=2+calibration_images=4 0.3" in capsys.readouterr().out


def test_noise_belongs_to_the_sample_alone():
    pipeline = pipelines.load_pipeline("shapes-unet")
    samples, _ = data.load_samples("shapes", 4)
    settings = dict(seed=0, steps=2, guidance_scale=4.0, image_size=64)
    together = generation.generate(pipeline, samples, batch_size=4, **settings).pixels.astype(int)
    apart = generation.generate(pipeline, samples[::-1], batch_size=1, **settings).pixels.astype(int)[::-1]
    other = generation.generate(pipeline, samples, batch_size=4, **{**settings, "seed": 1}).pixels.astype(int)
    assert abs(together - apart).max() <= 1  # batch sizes round differently
    assert abs(together - other).max() > 50


def test_noise_seeds_draw_each_sample_again_and_dense_is_compared_with_itself(tmp_path):
    flags = ["--num_images", "5", "--batch_size", "5",  # batches of a seed alone, as other batches round differently
             "--rates", "0.4", "--metrics", "clip_score", "lpips_dense", "psnr_dense", "fid"]
    one = measure(tmp_path / "one", *flags)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # of numpy: the psnr of equal images is infinite
        three = measure(tmp_path / "three", *flags, "--seeds", "3")
    assert [len(three.points[0].per_image[name]) for name in ("clip_score", "lpips_dense")] == [15, 15]
    for part in ("dense", "points"):  # the first seed is that of a run with one
        first, again = (getattr(r, part) if part == "dense" else r.points[0] for r in (one, three))
        assert first.per_image["clip_score"] == pytest.approx(again.per_image["clip_score"][:5], abs=1e-3)
    assert one.dense.seed_spread == {}
    spread = three.dense.seed_spread
    assert spread["lpips_dense"] > three.points[0].metrics["lpips_dense"] > 0
    assert spread["clip_score"] > 0
    assert 0 < spread["psnr_dense"] < three.points[0].metrics["psnr_dense"]
    low, high = three.points[0].intervals["lpips_dense"]
    assert low < three.points[0].metrics["lpips_dense"] < high


def test_a_spread_without_bound_is_neither_in_the_record_nor_told_nor_drawn(tmp_path):
    record = measure(tmp_path, "--rates", "0.4", "--metrics", "clip_score", "psnr_dense", "--seeds", "2")
    same = np.full(4, np.inf)  # as if the dense model drew the same from any noise
    values = {"clip_score": [1.0, 3.0, 1.0, 3.0], "psnr_dense": [*same, *same]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record.dense.seed_spread = pruning_analysis.seed_spread(values, 2, {"psnr_dense": same})
    write_record(record, tmp_path / "psnr.json")
    record = read_record(tmp_path / "psnr.json")
    assert record.dense.seed_spread == {"clip_score": 0.0, "psnr_dense": None}
    assert drawing.noise_levels(record, "psnr_dense") == {}
    assert "changes the dense model by clip_score 0 (clip_score:" in " ".join(summaries.summary(record).split())
    assert plots.draw_metrics(record, tmp_path / "psnr.png").is_file()


def test_real_images_are_nearer_to_the_reference_than_what_a_ruined_model_draws(tmp_path):
    record = measure(tmp_path, "--num_images", "8", "--rates", "0.9")
    for name in ("fid", "kid", "cmmd"):
        assert record.dense.floors[name] < record.points[0].metrics[name]


def test_a_record_names_what_made_it(measured):
    record, _ = measured
    assert set(record.backbones) == {name for name in DEFAULT if METRICS[name].backbone}
    for name in record.backbones.values():
        assert re.search(r", \w+ [0-9a-f]{12}$", name), name  # a hash of the weights
    assert record.settings["resize"] == data.RESIZE_RULE
    assert {"dtype", "device", "threads", "seed", "seeds", "denoiser"} <= set(record.settings)
    [code] = record.notes.code
    assert re.fullmatch(r"unknown|[0-9a-f]{12}( with changes)?", code)


def test_an_image_that_is_not_finite_is_null_and_not_a_score(tmp_path, monkeypatch):
    from pruning.methods import magnitude
    zero = magnitude.prune

    def break_it(denoiser, rate, **options):
        done = zero(denoiser, rate, **options)
        if rate:
            denoiser.conv_out.bias.data.fill_(float("nan"))
        return done

    monkeypatch.setattr(magnitude, "prune", break_it)
    record = measure(tmp_path, "--rates", "0.3")
    point = json.loads((tmp_path / "shapes-unet" / "shapes" / "magnitude.json").read_text())["points"][0]
    assert point["metrics"]["clip_score"] is None
    assert point["metrics"]["fid"] is None
    assert set(point["per_image"]["lpips"]) == {None}
    assert record.dense.metrics["fid"] is not None


def test_recorded_calls_are_the_dense_denoisers_own():
    pipeline = pipelines.load_pipeline("shapes-unet")
    samples, _ = data.load_samples("shapes", 4)
    calls = generation.record_calls(pipeline, samples, seed=0, steps=3, guidance_scale=4.0, image_size=64, batch_size=2)
    assert len(calls) == 2 * 3  # batches times steps
    for kwargs, target in calls:
        with torch.no_grad():
            assert torch.allclose(pipeline.unet(**kwargs).sample, target, atol=1e-5)


def test_a_pipeline_folder_is_a_model(tmp_path):
    shutil.copytree(pipelines.MODELS["shapes-unet"].folder, tmp_path / "mine")
    record = measure(tmp_path / "results", "--model", str(tmp_path / "mine"), "--rates", "0.5", "--guidance_scale", "4")
    assert record.model == "mine"
    assert record.settings["image_size"] == 64


@pytest.mark.parametrize(("flags", "words"), [
    (["--rates", "1.0"], "rate"),
    (["--rates", "-0.1"], "rate"),
    (["--rates", "much"], "rate"),
    (["--rates", "nan"], "rate"),
    (["--method", "magnitud"], "did you mean 'magnitude'"),
    (["--dataset", "cocoa"], "did you mean 'coco'"),
    (["--metrics", "clipscore"], "did you mean 'clip_score'"),
    (["--num_images", "0"], "1 or more"),
    (["--seeds", "0"], "1 or more"),
    (["--tolerance", "5"], "share between 0 and 1"),
    (["--num_images", "600"], "512"),
    (["--dataset", "coco", "--data_dir", "no/such/folder"], "no/such/folder"),
    (["--dataset", "flickr8k"], "--data_dir"),
    (["--model", "shapes-unett"], "did you mean 'shapes-unet'"),
    (["--model", "no/such/folder"], "no/such/folder"),
    (["--model", "someone/not-here"], "HF_HUB_OFFLINE=1 forbids the network"),
    (["--model", str(ROOT / "tests")], "model_index.json"),
    (["--scope", "global", "--method", "structured"], "--scope"),
    (["--device", "tpu9"], "tpu9"),
    (["--device", "meta"], "cpu, cuda or cuda:N"),
    (["--guidance_scale", "nan"], "finite number"),
    (["--seeds", "1001"], "1000 or less"),
    (["--seed", "9" * 20], "4294967295 or less"),
    (["--image_size", "9" * 9], "8192 or less"),
])
def test_bad_input_is_one_line_and_leaves_nothing(flags, words, tmp_path, capsys):
    line = fails(capsys, pruning_analysis.main, "--results_dir", tmp_path / "results", *flags)
    assert words in line
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(("flags", "words"), [
    (["--image_size", "16"], "the lpips network cannot measure images of 16 pixels a side; give another --image_size"),
    (["--steps", "1001", "--metrics", "psnr_dense"], "StableDiffusionPipeline cannot make these images: .*1001"),
    (["--image_size", "66", "--metrics", "psnr_dense"], "StableDiffusionPipeline .* 66|of 66")])
def test_settings_that_the_model_cannot_draw_or_are_too_small_are_refused_in_a_rehearsal(tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        prepare(tmp_path, *flags)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_where_there_is_none_is_an_error(tmp_path, capsys):
    assert "CUDA" in fails(capsys, pruning_analysis.main, "--results_dir", tmp_path, "--device", "cuda")


def test_the_shell_driver_passes_positions_and_flags_on(tmp_path):
    command_line = ["bash", str(ROOT / "run_pruning_analysis.sh"), "attention_heads", "3", "shapes", "--rates", "0.5",
                    "--criterion", "norm", "--refit", "off", "--steps", "2", "--results_dir", str(tmp_path)]
    subprocess.run(command_line, check=True, capture_output=True, cwd=str(tmp_path),
                   env={**os.environ, "PYTHON": sys.executable})
    record = read_record(tmp_path / "shapes-unet" / "shapes" / "attention_heads+criterion=norm+refit=off.json")
    assert (record.method, len(record.samples), record.dataset) == ("attention_heads", 3, "shapes")
    assert [point.rate for point in record.points] == [0.5]


def test_a_recovery_that_cannot_fit_is_refused_before_any_image(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * 10 ** 7))
    line = fails(capsys, pruning_analysis.main, *QUICK, "--method", "iterative", "--results_dir", str(tmp_path))
    assert "recovery needs 85 MB (weights 21 MB, gradients 21 MB, moments 42 MB) and activations on" in line
    assert not list(tmp_path.rglob("*.png"))


def test_recorded_calls_are_read_by_a_later_run_and_drawn_again_if_their_file_is_broken(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path / "cache"))
    flags = ["--method", "wanda", *FEW_CALLS, "--batch_size", "2"]
    first = prepare(tmp_path, *flags).calibration.calls
    paths, drawn, record = sorted((tmp_path / "cache").rglob("calls-*.pt")), [], generation.record_calls
    assert len(paths) == 2
    paths[1].unlink()  # the first run goes on with what it has mapped
    paths[1].write_bytes(b"broken")
    monkeypatch.setattr(generation, "record_calls", lambda pipeline, samples, *given, **settings: (
        drawn.append(len(samples)), record(pipeline, samples, *given, **settings))[1])
    again = prepare(tmp_path, *flags).calibration.calls
    assert drawn == [2]
    assert len(first) == len(again) > 2
    for (kwargs, target), (others, other) in zip(first, again):
        assert torch.equal(target, other)
        assert kwargs.keys() == others.keys()
        assert torch.equal(kwargs["sample"], others["sample"])


def test_recorded_calls_are_read_by_a_later_run_with_another_batch_size(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path / "cache"))
    first, again = (prepare(tmp_path, "--method", "wanda", *FEW_CALLS, "--batch_size", size).calibration
                    for size in ("16", "32"))
    calls, rows = first.calls, first.rows
    monkeypatch.setattr(generation, "record_calls", lambda *_, **__: pytest.fail("the calls are recorded again"))
    assert all(torch.equal(target, other) for (_, target), (_, other) in zip(calls, again.calls))
    assert again.rows == rows == {("sample",), ("encoder_hidden_states",)}


def test_a_calibration_memory_below_the_largest_layer_is_refused_before_any_image(tmp_path, capsys):
    line = fails(capsys, pruning_analysis.main, *QUICK, "--method", "wanda", "--calibration_memory", "0.001",
                 "--results_dir", str(tmp_path))
    assert "give --calibration_memory 0.02 or more" in line
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".png", ".json")]


def test_no_shipped_record_stands_in_the_way_of_the_first_command():
    """A sweep into results/ would have to go on with it, which other versions of packages may not."""
    shipped = subprocess.run(["git", "ls-files", "results"], cwd=str(ROOT), capture_output=True, text=True).stdout
    assert all(path.startswith("results/bundled/") for path in shipped.split())


@pytest.mark.parametrize(("method", "words"), [("joint", "leave out 0.9"), ("modulation", "no AdaLN layers")])
def test_what_a_method_cannot_reach_is_said_before_any_image_is_made(tmp_path, capsys, method, words):
    said = fails(capsys, pruning_analysis.main, "--method", method, "--rates", "0.3", "0.9", "--num_images", "2",
                 "--steps", "2", "--device", "cpu", "--results_dir", tmp_path, *FEW_CALLS)
    assert words in said
    assert not list(tmp_path.rglob("*.png"))


def peaks(folder, count, dense):
    """The most bytes that numpy holds at a time while a point of `count` images is read and measured: step -> bytes."""
    made = prepare(folder, *PAIRS, count=count)
    for index, pixels in enumerate(np.random.RandomState(0).randint(0, 256, (count, 64, 64, 3)).astype(np.uint8)):
        for rate in (0.0, 0.5):  # images of a stand-in for the pipeline
            store.save_image(store.Made(pixels, True, 1.0, 1), steps.image_file(made, rate, index),
                             steps.image_provenance(made, rate, index))
    run, pruned = pruning_analysis.run_pruning_experiment, dataclasses.replace(dense, rate=0.5)
    whole = dataclasses.replace(dense, per_image={name: [1.0] * count for name in dense.per_image})
    uses = {"originals": lambda: originals.content_hash(made.samples, 64),
            "images": lambda: steps.make_images(made, 0.0),
            "dense": lambda: run(made, 0.0, measured=dense),
            "metrics": lambda: run(made, 0.5, whole, measured=pruned)}
    found = {}
    for name, use in uses.items():
        tracemalloc.start()
        use()
        found[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return found


def test_memory_does_not_grow_with_the_number_of_images(tmp_path, monkeypatch):
    """Each step may grow by a quarter of the images of a rate: 30,000 of 512 pixels a side would take 24 GB."""
    for module in (originals, steps):
        monkeypatch.setattr(module, "BLOCK", 8)
    dense = pruning_analysis.run_pruning_experiment(prepare(tmp_path / "2", *PAIRS), 0.0)
    # Both have so many blocks that reading ahead overlaps with measuring as far as it can.
    few, many = (peaks(tmp_path / str(count), count, dense) for count in (40, 256))
    for name, peak in many.items():
        assert peak - few[name] < (256 - 40) * 64 * 64 * 3 / 4, (name, few[name], peak)
