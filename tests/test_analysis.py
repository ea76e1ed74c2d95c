"""The commands end to end on the bundled model, with few images and steps."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pruning import cli, data, metrics, pruning_analysis, test_single_rate
from pruning.methods import METHODS
from pruning.metrics import METRICS
from pruning.models import pipelines
from pruning.records.record import read_record

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["--num_images", "4", "--steps", "4", "--batch_size", "4", "--device", "cpu"]
RATES = ["--rates", "0.3", "0.8"]


def sweep(folder, *flags):
    """Run the command in this process; the record that it wrote."""
    pruning_analysis.main([*QUICK, "--results_dir", str(folder), *flags])
    return next(read_record(path) for path in sorted(Path(folder).glob("*/*/*.json")))


def fails(capsys, main, *flags):
    """The one line on stderr with which a command refuses, after checking that it is one, and the exit code."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: main([str(flag) for flag in flags]))
    lines = [line for line in capsys.readouterr().err.splitlines() if "it/s" not in line and line.strip()]
    assert stop.value.code == 2
    assert len(lines) == 1, lines
    return lines[0]


def measurements(record):
    """Everything measured but times, as one list of numbers."""
    numbers = []
    for point in [record.dense, *record.points]:
        numbers += [point.rate, point.sparsity, point.units_taken, point.parameters, point.nonzero_parameters]
        numbers += [value or 0 for name, value in sorted(point.metrics.items()) if name != "generation_time"]
        numbers += [value or 0 for _, values in sorted(point.per_image.items()) for value in values]
    return numbers


@pytest.fixture(scope="module", params=list(METHODS))
def measured(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    recovery = ["--recovery_steps", "2"] if request.param == "iterative" else []
    return sweep(folder, "--method", request.param, *RATES, *recovery), folder


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
    assert record.dense.macs == 219_125_760  # of one latent, as torch counts the bundled UNet


def test_offloading_changes_no_image_and_no_count(tmp_path):
    """On the CPU the command refuses it, but diffusers' hooks that move whole models about work there too."""
    seen = {}
    for choice in (None, "model"):
        parser = cli.Parser("")
        pruning_analysis.add_arguments(parser)
        flags = ["--method", "structured", *QUICK[2:], "--metrics", "lpips_dense"]
        args = parser.parse_args(flags)
        args.num_images, args.results_dir = 2, tmp_path / str(choice)
        experiment = pruning_analysis.prepare(args)
        experiment.offload = choice
        experiment.record.dense = pruning_analysis.run_pruning_experiment(experiment, 0.0)
        point = pruning_analysis.run_pruning_experiment(experiment, 0.5)
        pruning_analysis.save_pruned(experiment, tmp_path / f"{choice}-pruned", point)
        seen[choice] = (point.metrics["lpips_dense"], point.macs, point.parameters)
        assert pipelines.load_pipeline(str(tmp_path / f"{choice}-pruned")).unet.num_parameters() == point.parameters
    assert seen[None] == seen["model"]


def test_every_promised_file_is_there_and_no_other(measured):
    record, folder = measured
    own = folder / record.model / record.dataset
    ends = (".json", ".png", "_metrics.png", "_cost.png", "_images.png", ".txt")
    promised = {f"{record.method}{end}" for end in ends}
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
        assert set(point.per_image) == {name for name in METRICS if METRICS[name].per_image}


def test_scores_are_those_of_the_images_on_disk(measured):
    record, folder = measured
    own = folder / record.model / record.dataset / "images" / record.method / "0.3"
    images = np.stack([np.asarray(Image.open(path)) for path in sorted(own.iterdir())])
    clip = metrics.load_backbone("bundled", "clip")
    texts, _ = metrics.embed_captions(clip, [sample["caption"] for sample in record.samples])
    scores = metrics.clip_score(metrics.embed_images(clip, images), texts)
    assert scores == pytest.approx(record.points[0].per_image["clip_score"], abs=1e-3)


def test_a_sweep_cut_off_goes_on_and_ends_like_an_undisturbed_one(tmp_path, monkeypatch):
    whole = sweep(tmp_path / "whole", *RATES)
    measure = pruning_analysis.run_pruning_experiment

    def cut_off(experiment, rate, **kwargs):
        if rate == 0.8:
            raise KeyboardInterrupt
        return measure(experiment, rate, **kwargs)

    monkeypatch.setattr(pruning_analysis, "run_pruning_experiment", cut_off)
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path / "cut", *RATES)
    kept = read_record(tmp_path / "cut" / "shapes-unet" / "shapes" / "magnitude.json")
    assert [point.rate for point in kept.points] == [0.3]
    assert (tmp_path / "cut" / "shapes-unet" / "shapes" / "magnitude.png").exists()

    measured = []
    monkeypatch.setattr(pruning_analysis, "run_pruning_experiment",
                        lambda experiment, rate, **kw: measured.append(rate) or measure(experiment, rate, **kw))
    resumed = sweep(tmp_path / "cut", *RATES)
    assert measurements(resumed) == pytest.approx(measurements(whole), rel=1e-4, abs=1e-6)
    assert (resumed.settings, resumed.samples, resumed.notes) == (whole.settings, whole.samples, whole.notes)
    assert measured == [0.8]


def test_a_record_of_other_settings_is_refused_with_the_difference_named(tmp_path, capsys):
    flags = [*QUICK, "--rates", "0.3", "--results_dir", str(tmp_path)]
    pruning_analysis.main(flags)
    line = fails(capsys, pruning_analysis.main, *flags, "--steps", "5", "--scope", "global")
    assert "steps: 4 and 5" in line
    assert "scope: layer and global" in line
    pruning_analysis.main([*flags, "--steps", "5", "--overwrite"])
    assert read_record(tmp_path / "shapes-unet" / "shapes" / "magnitude.json").settings["steps"] == 5


def test_a_single_rate_equals_the_same_rate_of_an_iterative_sweep(tmp_path, capsys):
    flags = ["--method", "iterative", "--recovery_steps", "2", "--metrics", "clip_score"]
    swept = sweep(tmp_path / "sweep", *flags, "--rates", "0.1", "0.2", "0.3")
    test_single_rate.main([*QUICK, *flags, "--rate", "0.3", "--results_dir", str(tmp_path / "single")])
    single = read_record(next((tmp_path / "single").glob("*/*/*.json")))
    assert single.points[0].per_image == swept.points[2].per_image
    assert "iterative 0.3" in capsys.readouterr().out


def test_noise_belongs_to_the_sample_alone():
    pipeline = pipelines.load_pipeline("shapes-unet")
    samples, _ = data.load_samples("shapes", 4)
    settings = dict(seed=0, steps=2, guidance_scale=4.0, image_size=64)
    together = pipelines.generate(pipeline, samples, batch_size=4, **settings).pixels.astype(int)
    apart = pipelines.generate(pipeline, samples[::-1], batch_size=1, **settings).pixels.astype(int)[::-1]
    other = pipelines.generate(pipeline, samples, batch_size=4, **{**settings, "seed": 1}).pixels.astype(int)
    assert abs(together - apart).max() <= 1  # batch sizes round differently
    assert abs(together - other).max() > 50


def test_noise_seeds_draw_each_sample_again_and_dense_is_compared_with_itself(tmp_path):
    flags = ["--num_images", "5", "--rates", "0.4", "--metrics", "clip_score", "lpips_dense", "fid"]
    one = sweep(tmp_path / "one", *flags)
    three = sweep(tmp_path / "three", *flags, "--seeds", "3")
    assert [len(three.points[0].per_image[name]) for name in ("clip_score", "lpips_dense")] == [15, 15]
    for part in ("dense", "points"):  # the first seed is that of a run with one
        first, again = (getattr(r, part) if part == "dense" else r.points[0] for r in (one, three))
        assert first.per_image["clip_score"] == pytest.approx(again.per_image["clip_score"][:5], abs=1e-3)
    assert one.notes["seed_spread"] == {}
    spread = three.notes["seed_spread"]
    assert spread["lpips_dense"] > three.points[0].metrics["lpips_dense"] > 0
    assert spread["clip_score"] > 0
    low, high = three.points[0].intervals["lpips_dense"]
    assert low < three.points[0].metrics["lpips_dense"] < high


def test_real_images_are_nearer_to_the_reference_than_what_a_ruined_model_draws(tmp_path):
    record = sweep(tmp_path, "--num_images", "8", "--rates", "0.9")
    for name in ("fid", "kid", "cmmd"):
        assert record.notes["floors"][name] < record.points[0].metrics[name]


def test_a_record_names_what_made_it(measured):
    record, _ = measured
    assert set(record.backbones) == {name for name in METRICS if METRICS[name].backbone}
    for name in record.backbones.values():
        assert re.search(r", \w+ [0-9a-f]{12}$", name), name  # a hash of the weights
    assert record.settings["resize"] == data.RESIZE_RULE
    assert {"dtype", "device", "threads", "seed", "seeds", "denoiser"} <= set(record.settings)
    [code] = record.notes["code"]
    assert re.fullmatch(r"unknown|[0-9a-f]{12}( with changes)?", code)


def test_an_image_that_is_not_finite_is_null_and_not_a_score(tmp_path, monkeypatch):
    pipelines = []
    load = pipelines.load_pipeline
    monkeypatch.setattr(pipelines, "load_pipeline", lambda *a: pipelines.append(load(*a)) or pipelines[-1])
    from pruning.methods import magnitude
    zero = magnitude.prune

    def break_it(denoiser, rate, **options):
        done = zero(denoiser, rate, **options)
        if rate:
            denoiser.conv_out.bias.data.fill_(float("nan"))
        return done

    monkeypatch.setattr(magnitude, "prune", break_it)
    record = sweep(tmp_path, "--rates", "0.3")
    point = json.loads((tmp_path / "shapes-unet" / "shapes" / "magnitude.json").read_text())["points"][0]
    assert point["metrics"]["clip_score"] is None
    assert point["metrics"]["fid"] is None
    assert set(point["per_image"]["lpips"]) == {None}
    assert record.dense.metrics["fid"] is not None


def test_recorded_calls_are_the_dense_denoisers_own():
    pipeline = pipelines.load_pipeline("shapes-unet")
    samples, _ = data.load_samples("shapes", 4)
    calls = pipelines.record_calls(pipeline, samples, seed=0, steps=3, guidance_scale=4.0, image_size=64, batch_size=2)
    assert len(calls) == 2 * 3  # batches times steps
    for kwargs, target in calls:
        with torch.no_grad():
            assert torch.allclose(pipeline.unet(**kwargs).sample, target, atol=1e-5)


def test_a_pipeline_folder_is_a_model(tmp_path):
    shutil.copytree(pipelines.MODELS["shapes-unet"].folder, tmp_path / "mine")
    record = sweep(tmp_path / "results", "--model", str(tmp_path / "mine"), "--rates", "0.5", "--guidance_scale", "4")
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
    (["--model", "someone/not-here"], "download"),
    (["--model", str(ROOT / "tests")], "model_index.json"),
    (["--scope", "global", "--method", "structured"], "--scope"),
    (["--device", "tpu9"], "tpu9"),
])
def test_bad_input_is_one_line_and_leaves_nothing(flags, words, tmp_path, capsys):
    line = fails(capsys, pruning_analysis.main, "--results_dir", tmp_path / "results", *flags)
    assert words in line
    assert not (tmp_path / "results").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_where_there_is_none_is_an_error(tmp_path, capsys):
    assert "CUDA" in fails(capsys, pruning_analysis.main, "--results_dir", tmp_path, "--device", "cuda")


@pytest.mark.parametrize("script", ["pruning_analysis", "test_single_rate", "visualize_results",
                                    "generate_synthetic_graph"])
def test_help_runs_from_anywhere_with_an_example_and_without_torch(script, tmp_path):
    code = f"import sys, runpy; sys.argv = ['x', '--help']; sys.path.insert(0, {str(ROOT / 'pruning')!r})\n" \
           f"try: runpy.run_path({str(ROOT / 'pruning' / (script + '.py'))!r}, run_name='__main__')\n" \
           "except SystemExit: sys.exit('torch' in sys.modules and 'torch was imported')"
    done = subprocess.run([sys.executable, "-c", code], cwd=str(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "example:" in done.stdout
    assert "default: " in done.stdout


def test_the_shell_driver_passes_positions_and_flags_on(tmp_path):
    command_line = ["bash", str(ROOT / "run_pruning_analysis.sh"), "structured", "3", "shapes", "--rates", "0.5",
                    "--steps", "2", "--results_dir", str(tmp_path)]
    subprocess.run(command_line, check=True, capture_output=True, cwd=str(tmp_path),
                   env={**os.environ, "PYTHON": sys.executable})
    record = read_record(tmp_path / "shapes-unet" / "shapes" / "structured.json")
    assert (record.method, len(record.samples), record.dataset) == ("structured", 3, "shapes")
    assert [point.rate for point in record.points] == [0.5]


def test_no_shipped_record_stands_in_the_way_of_the_first_command():
    """A sweep into results/ would have to go on with it, which other versions of packages may not."""
    shipped = subprocess.run(["git", "ls-files", "results"], cwd=str(ROOT), capture_output=True, text=True).stdout
    assert all(path.startswith("results/bundled/") for path in shipped.split())


def test_the_readmes_metric_takes_one_entry_and_one_line(tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    entry, line = re.findall(r"```python\n# in (?:METRICS|run_pruning_experiment).*\n((?:.*\n)+?)```", readme)
    shutil.copytree(ROOT / "pruning", tmp_path / "pruning", ignore=shutil.ignore_patterns("__pycache__"))
    for file, opening, addition in (("metrics.py", "METRICS = {\n", entry),
                                    ("pruning_analysis.py", "    measure = {\n", line)):
        path = tmp_path / "pruning" / file
        text = path.read_text(encoding="utf-8")
        assert text.count(opening) == 1
        path.write_text(text.replace(opening, opening + addition), encoding="utf-8")
    subprocess.run([sys.executable, str(tmp_path / "pruning" / "pruning_analysis.py"), *QUICK, "--rates", "0.5"],
                   check=True, capture_output=True)
    record = json.loads((tmp_path / "results" / "shapes-unet" / "shapes" / "magnitude.json").read_text())
    assert record["points"][0]["metrics"]["contrast"] > 0
    assert len(record["points"][0]["per_image"]["contrast"]) == 4
