"""Figures and summaries: up is better, gaps stay gaps, and the sentences say what the numbers say."""
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pruning import UserError, merge_results, visualize_results
from pruning.methods import METHODS
from pruning.metrics.intervals import mean_interval
from pruning.records import findings, plots, summaries
from pruning.records.record import Point, Record, read_record, record_path, write_record

ROOT = Path(__file__).resolve().parents[1]
RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
CLIP = {  # mean scores at 0, 0.1 ... 0.9
    "magnitude": (83.0, 83.1, 80.2, 79.0, 70.0, 60.4, 16.4, 0.5, -5.5, 6.9),
    "structured": (83.0, 76.0, 58.0, 31.0, 12.0, 6.0, 4.0, 2.0, 5.0, 3.0),
    "iterative": (83.0, 82.9, 82.9, 82.5, 81.8, 80.1, 76.0, 66.0, 40.0, 10.0),
    "attention_heads": (83.0, 82.0, 79.5, 74.0, 66.0, 55.0, 43.0, 36.0, 30.0, 27.0),
}
MASKS = ("magnitude", "iterative")


def make_record(method="magnitude", rates=RATES, clip=None, images=32, model="shapes-unet", dataset="shapes", noise=1):
    """A plausible record; clip: mean scores, dense first; noise: of the paired differences between rates."""
    clip = (CLIP.get(method) or CLIP["magnitude"])[:len(rates) + 1] if clip is None else clip

    def point(rate, score):
        own = np.random.RandomState(round(100 * rate) + sum(map(ord, method)) * (rate > 0)).randn(images)
        of_images = 6 * np.random.RandomState(0).randn(images) + noise * own
        of_images -= of_images.mean()
        fallen = 1 - (score or 0) / 83.0
        taken = round(4_800_000 * rate)
        kept = 5_300_628 - (0 if method in MASKS else round(0.4 * taken))
        metrics = {"clip_score": score, "kid": 90 * fallen, "fid": 14 + 260 * fallen ** 2 + 6 * rate,
                   "lpips": 0.42 + 0.3 * fallen, "lpips_dense": 0.55 * math.sqrt(max(rate, 0) * max(fallen, 0.05)),
                   "generation_time": 0.171 * (kept / 5_300_628) ** 0.5 + 0.002 * math.sin(31 * rate)}
        per_image = {name: [None if metrics[name] is None else metrics[name] + x * scale for x in of_images]
                     for name, scale in (("clip_score", 1.0), ("lpips", 0.01), ("lpips_dense", 0.01 * (rate > 0)))}
        return Point(
            rate=rate, sparsity=rate, unit=METHODS[method].unit if method in METHODS else "weights",
            units_total=4_800_000, units_asked=taken, units_taken=taken,
            parameters=kept, nonzero_parameters=kept - (taken if method in MASKS else 0), weight_bytes=4 * kept,
            denoiser_seconds=0.02 * (kept / 5_300_628) ** 0.5, dense_denoiser_seconds=0.02,
            image_seconds=0.1 * (kept / 5_300_628) ** 0.3, dense_image_seconds=0.1,
            macs=round(4e8 * (kept / 5_300_628) ** 0.8), peak_bytes=4 * kept + 2_000_000,
            metrics=metrics, seconds={"prune": 0.1, "generate": 5.5, "measure": 0.8}, per_image=per_image,
            intervals={})

    points = [point(rate, score) for rate, score in zip((0.0, *rates), clip)]
    for each in points:
        for name, values in each.per_image.items():
            base = 0 if name == "lpips_dense" else np.array(points[0].per_image[name], float)
            each.intervals[name] = mean_interval(np.array(values, float) - base)
    return Record(
        model=model, dataset=dataset, method=method,
        samples=[{"id": f"prompts-{i:05d}", "caption": f"a large red cross above a small triangle on beige, {i}"}
                 for i in range(images)],
        settings={"seed": 0, "seeds": 1, "steps": 20, "guidance_scale": 4.0, "batch_size": 32, "dtype": "float32",
                  "image_size": 64, "device": "cpu", "threads": 2, "metrics": list(points[0].metrics),
                  "metric_backbones": "bundled"},
        backbones={"clip_score": "bundled shapes-clip", "fid": "bundled shapes-squeezenet (64 outputs)",
                   "lpips": "bundled shapes-squeezenet (unweighted)",
                   "lpips_dense": "bundled shapes-squeezenet (unweighted)"},
        notes={"reference_images": 2048, "floors": {"fid": 1.5, "kid": 0.2}, "fid_feature_size": 64,
               "captions_truncated": 0, "captions_skipped": 0},
        versions={"python": "3.11.7", "torch": "2.15.0", "diffusers": "0.42.0", "transformers": "5.23.0"},
        dense=points[0], points=points[1:])


def flat(text):
    """Without line breaks, which may fall anywhere."""
    return " ".join(text.split())


def keep_metrics(record, *names):
    for point in (record.dense, *record.points):
        point.metrics = {name: value for name, value in point.metrics.items() if name in names}
        point.per_image = {name: value for name, value in point.per_image.items() if name in names}
        point.intervals = {name: value for name, value in point.intervals.items() if name in names}
    return record


def save_images(folder, record, positions, rates):
    """One plain picture each: red goes with the rate, green with the position."""
    for rate in rates:
        for k in positions:
            path = folder / "images" / record.method / findings.rate_folder(rate) / f"{k:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), (round(200 * rate), 20 * k, 90)).save(path)


@pytest.mark.parametrize(("metric", "worse", "dense", "better"), [
    ("clip_score", 40, 80, 81), ("fid", 40, 10, 9), ("lpips", 0.8, 0.4, 0.3), ("lpips_dense", 0.2, 0.0, -0.1),
    ("ssim_dense", 0.8, 1.0, 1.1)])
def test_up_is_better_for_every_metric_and_dense_is_1(metric, worse, dense, better):
    assert findings.relative(metric, dense, dense) == 1
    assert findings.relative(metric, worse, dense) < 1 < findings.relative(metric, better, dense)


def test_each_metric_is_normalised_as_its_label_says():
    assert findings.relative("clip_score", 40, 80) == 0.5
    assert findings.relative("fid", 40, 10) == 0.25
    assert findings.relative("lpips_dense", 1.2, 0.0) == pytest.approx(-0.2)  # not clipped


@pytest.mark.parametrize(("metric", "value", "dense"), [
    ("clip_score", None, 80), ("clip_score", 40, None), ("clip_score", 40, 0), ("clip_score", 40, -1),
    ("fid", 0, 10), ("fid", 10, 0), ("lpips_dense", None, 0.0), ("kid", 2, 1), ("psnr_dense", 30, None)])
def test_what_cannot_be_said_relative_to_dense_is_a_gap(metric, value, dense):
    assert math.isnan(findings.relative(metric, value, dense))


@pytest.mark.parametrize("heights", [[0.5], [0.5] * 4, [1.0, 0.99, 0.98], [0.0, 0.01, 0.9], [0.3, 0.1, 0.32]])
def test_labels_are_pushed_apart_in_their_order_and_stay_below_the_top(heights):
    placed = plots._spread(heights, 0.1)
    ordered = [placed[i] for i in sorted(range(len(heights)), key=lambda i: heights[i])]
    assert all(above - below > 0.1 - 1e-9 for below, above in zip(ordered, ordered[1:]))
    assert max(placed) <= 1


def test_how_far_is_decided_on_the_interval_and_not_on_the_mean():
    """The means are the same in all; only how sure they are differs."""
    clip = (80, 79.5, 78.5, 76.5, 60, 79)  # dense, then 0.1 to 0.5: within 5 % up to 0.3
    rates = (0.1, 0.2, 0.3, 0.4, 0.5)
    reached = {noise: findings.last_good(make_record(rates=rates, clip=clip, noise=noise)) for noise in (0.2, 3, 60)}
    assert reached[0.2].rate == 0.3  # and not 0.5, beyond one that fails
    assert reached[3].rate == 0.2
    assert reached[60] is None


def test_the_tolerance_is_a_share_of_dense():
    record = make_record(rates=(0.1, 0.2, 0.3), clip=(80, 76.5, 72.5, 68.5), noise=0.1)
    assert [findings.last_good(record, tolerance).rate for tolerance in (0.05, 0.10, 0.15)] == [0.1, 0.2, 0.3]


def test_what_cannot_be_decided_does_not_hold():
    record = make_record(rates=(0.1,), clip=(80, 80))
    record.points[0].intervals["clip_score"] = None
    assert findings.holds(record.points[0], record.dense, 0.05) is None
    assert findings.last_good(record) is None


def test_the_summary_begins_with_how_far_and_how_sure():
    text = flat(summaries.summary(make_record("magnitude")))
    assert text.startswith("How far? magnitude pruning of shapes-unet stays within 5 % of dense by clip_score up to "
                           "rate 0.2, which has 96.6 % of dense (95 % interval")
    assert "Not surely at the next: rate 0.3 has 95.2 % of dense (95 % interval" in text


def test_the_summary_of_masks_says_that_zeros_gain_nothing():
    text = flat(summaries.summary(make_record("magnitude")))
    assert "first falls below half of dense at rate 0.6" in text
    assert "zeros do not shrink it, nor do they make dense kernels faster" in text
    assert "a denoiser call takes 1.00 times as long" in text
    assert "here 32 images against 2048 reference images in 64 features; as many real images have 1.5" in text


def test_the_summary_of_removal_says_what_was_gained():
    text = flat(summaries.summary(make_record("attention_heads")))
    assert "up to rate 0.2" in text
    assert "at rate 0.2, parameters fall from 5,300,628 to 4,916,628 (−7.2 %), weights from 21.2 to 19.7 MB" in text
    assert "at rate 0.9, parameters fall from 5,300,628 to 3,572,628 (−32.6 %)" in text
    assert "a denoiser call takes 0.82 times as long" in text
    assert "zeros" not in text


def test_the_table_has_a_row_a_rate_and_shows_what_is_not_finite():
    record = make_record()
    record.points[8].metrics["fid"] = None
    quality = summaries.summary(record).partition("What it costs")[0]
    rows = [line.split() for line in quality.splitlines()]
    table = {row[0]: row for row in rows if row and row[0] in ("dense", *map(str, RATES))}
    assert list(table) == ["dense", *map(str, RATES)]
    assert table["0.5"][1:4] == ["0.500", "60.4", "±"]
    assert "–" not in table["0.8"]
    assert "–" in table["0.9"]
    assert "–: not finite" in summaries.summary(record)


def test_costs_are_those_of_the_record_and_times_are_shares_of_dense_timed_in_turn():
    record = make_record("structured")
    point = record.points[4]
    point.denoiser_seconds, point.dense_denoiser_seconds = 0.03, 0.04
    point.image_seconds, point.dense_image_seconds = 0.5, 0.25
    costs = summaries.summary(record).partition("What it costs")[2].splitlines()
    row = next(line.split() for line in costs if line.split()[:1] == ["0.5"])
    shown = [point.parameters / 1e6, point.nonzero_parameters / 1e6, point.weight_bytes / 1e6, point.peak_bytes / 1e6,
             point.macs / 1e9, 0.75, 2.0]
    assert [float(value) for value in row[1:]] == pytest.approx(shown, rel=1e-3)


def test_what_a_method_left_out_is_said_with_the_reason():
    record = make_record("attention_heads")
    assert "Left out" not in summaries.summary(record)
    record.notes["left_out"] = {"a.attn1": "its class NewAttention is not known", "b.attn2": "its processor is Odd",
                                "c.attn1": "its class NewAttention is not known"}
    assert ("Left out: 2 modules (a.attn1, …), as its class NewAttention is not known; 1 module (b.attn2), "
            "as its processor is Odd.") in flat(summaries.summary(record))


@pytest.mark.parametrize(("record", "words"), [
    (make_record(clip=(0.0, 1.0), rates=(0.1,)), "it cannot be said, as clip_score of the dense model is 0"),
    (make_record(clip=(None, 1.0), rates=(0.1,)), "it cannot be said, as clip_score of the dense model is –"),
    (keep_metrics(make_record(), "fid"), "it cannot be said, as clip_score was not measured"),
    (make_record(clip=(80, 50), rates=(0.1,)), "no rate measured stays surely within 5 % of dense"),
    (make_record(rates=(0.1, 0.2)), "does not fall below half of dense up to rate 0.2"),
    (make_record(clip=(80, 79, None, 10), rates=(0.1, 0.2, 0.3)), "Collapse: clip_score is not finite at rate 0.2"),
    (make_record(images=4), "it cannot be said of 4 samples, an interval takes 5 or more"),
    (make_record(rates=()), "no rate has been measured yet"),
], ids=lambda x: x[:30] if isinstance(x, str) else "")
def test_the_summary_claims_no_more_than_was_measured(record, words):
    assert words in flat(summaries.summary(record))


def test_the_comparison_names_the_best_at_each_rate_and_what_is_within_the_noise():
    text = summaries.comparison_summary([make_record(name) for name in CLIP])
    lines = [line.strip() for line in text.splitlines()]
    assert "0.1  magnitude; iterative within the noise" in lines
    assert "0.5  iterative" in lines
    assert "0.9  attention_heads; all are below half of dense" in lines
    noisy = summaries.comparison_summary([make_record(name, noise=40) for name in CLIP])
    assert "0.2  iterative; magnitude and attention_heads within the noise" in noisy
    assert "structured pruning of shapes-unet: no rate measured stays surely within 5 %" in text
    assert "iterative pruning of shapes-unet stays within 5 % of dense by clip_score up to rate 0.5" in flat(text)


def test_other_noise_is_told_and_drawn_as_what_a_change_must_exceed(tmp_path):
    record = make_record(rates=(0.1, 0.2))
    plots.draw_metrics(record, tmp_path / "without.png")
    record.notes["seed_spread"] = {"lpips_dense": 0.3, "clip_score": 0.8}
    plots.draw_metrics(record, tmp_path / "with.png")
    assert "Noise: clip_score 0.8, lpips_dense 0.3 is what the dense model has" in flat(summaries.summary(record))
    assert (tmp_path / "without.png").read_bytes() != (tmp_path / "with.png").read_bytes()


def with_gaps():
    record = make_record("a_new_method", clip=(83, 80, None, 20, None))
    record.model = "some/model $x_1^ and $"  # no mathematics
    return record


@pytest.mark.parametrize("record", [
    make_record(rates=(0.3,), images=1), keep_metrics(make_record(rates=()), "clip_score"), with_gaps(),
    keep_metrics(make_record(clip=(None, None), rates=(0.1,)), "clip_score"),
    keep_metrics(make_record(rates=(0.1,)), "generation_time"),
], ids=["one point, one image", "dense alone", "gaps, unknown method", "nothing finite", "only time"])
def test_whatever_a_record_holds_is_drawn(tmp_path, record):
    written = plots.draw_all(record, tmp_path, tmp_path / "images")
    assert [path.name for path in written] == [
        f"{record.method}.png", f"{record.method}_metrics.png", f"{record.method}_cost.png",
        f"{record.method}.txt"]  # no image, no figure of images
    assert sorted(tmp_path.iterdir()) == sorted(written)
    for path in written[:2]:
        with Image.open(path) as image:
            assert image.width >= 700
            assert len(np.unique(np.asarray(image.convert("L")))) > 20


def test_images_are_drawn_captions_down_and_rates_across(tmp_path):
    record = make_record(rates=(0.5,))
    save_images(tmp_path, record, range(8), (0.0, 0.5))
    (tmp_path / "images/magnitude/0.5/0001.png").unlink()
    assert plots.draw_images(record, tmp_path / "images", tmp_path / "x.png") == tmp_path / "x.png"
    with Image.open(tmp_path / "x.png") as image:
        pixels = np.asarray(image.convert("RGB"))

    def place(rate, k):
        y, x = np.nonzero((np.abs(pixels.astype(int) - (round(200 * rate), 20 * k, 90)) <= 1).all(-1))
        return (np.median(x), np.median(y)) if len(x) > 500 else None
    assert place(0.0, 0)[0] < place(0.5, 0)[0]  # rates across
    assert place(0.0, 0)[1] < place(0.0, 1)[1] < place(0.0, 5)[1]  # captions down
    assert place(0.5, 1) is None  # the missing one is left out
    assert place(0.0, 6) is None  # six are enough


def test_a_broken_image_is_named_and_nothing_is_written(tmp_path):
    record = make_record(rates=(0.5,))
    save_images(tmp_path, record, range(1), (0.0,))
    (tmp_path / "images/magnitude/dense/0000.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(UserError, match="0000.png"):
        plots.draw_all(record, tmp_path, tmp_path / "images")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_the_names_of_lines_do_not_touch():
    from matplotlib.figure import Figure
    figure = Figure(figsize=(4.8, 2.9), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1])
    lines = plots._lines([], plots.METHODS)
    plots._label_ends(figure, (axes, [(1, 0.5, name, lines[name]) for name in plots.METHODS]))
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert len(boxes) == 4
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(box.x1 <= figure.bbox.x1 for box in boxes)


def test_a_method_keeps_its_line_whatever_else_is_drawn():
    alone, together = plots._lines(["iterative"], plots.METHODS), plots._lines(["x", "magnitude"], plots.METHODS)
    assert alone["iterative"] == together["iterative"]
    assert len(set(together.values())) == 5


# ---- the command

@pytest.fixture
def results(tmp_path):
    """Two methods of one model on two datasets."""
    for dataset in ("shapes", "coco"):
        for method in ("magnitude", "structured"):
            record = keep_metrics(make_record(method, rates=(0.1, 0.2), dataset=dataset), "clip_score")
            write_record(record, record_path(tmp_path, record.model, dataset, method))
    return tmp_path


def pictures(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


def test_each_record_found_is_drawn_beside_itself_and_its_paths_are_printed(results, capsys):
    visualize_results.main(["--results_dir", str(results), "--methods", "structured"])
    expected = [f"shapes-unet/{dataset}/structured{end}" for dataset in ("coco", "shapes") for end in
                (".png", "_cost.png", "_metrics.png")]
    assert pictures(results) == expected
    assert set(capsys.readouterr().out.split()) >= {str(results / path) for path in expected}


def test_compare_draws_models_measured_alike_together_and_names_what_differs_otherwise(tmp_path, capsys):
    for model, images in (("shapes-unet", 32), ("shapes-mmdit", 32)):
        for method in ("magnitude", "structured"):
            record = make_record(method, model=model, images=images)
            record.settings.update(denoiser=f"that of {model}", pipeline=f"the rest of {model}")
            write_record(record, record_path(tmp_path, model, "shapes", method))
    visualize_results.main(["--results_dir", str(tmp_path), "--compare"])
    assert "models_shapes.png" in pictures(tmp_path)
    assert capsys.readouterr().err.count("share no figure") == 0
    (tmp_path / "models_shapes.png").unlink()
    for method in ("magnitude", "structured"):
        write_record(make_record(method, model="shapes-mmdit", images=8),
                     record_path(tmp_path, "shapes-mmdit", "shapes", method))
    visualize_results.main(["--results_dir", str(tmp_path), "--compare"])
    assert "models_shapes.png" not in pictures(tmp_path)
    assert "samples: 8 and 32" in capsys.readouterr().err


def test_compare_draws_each_model_and_dataset_apart(results, tmp_path):
    visualize_results.main(["--results_dir", str(results), "--compare", "--output_dir", str(tmp_path / "out")])
    assert pictures(results) == ["out/shapes-unet/coco/comparison.png", "out/shapes-unet/shapes/comparison.png"]
    assert (tmp_path / "out/shapes-unet/coco/comparison.txt").read_text().count("magnitude") > 3


def test_compare_refuses_records_that_were_measured_differently(results):
    path = record_path(results, "shapes-unet", "shapes", "structured")
    path.write_text(path.read_text().replace('"steps": 20', '"steps": 30'))
    with pytest.raises(UserError, match="steps: 20 and 30"):
        visualize_results.main(["--results_dir", str(results), "--compare"])
    assert pictures(results) == []
    visualize_results.main(["--results_dir", str(results), "--compare", "--force"])
    assert len(pictures(results)) == 2
    forced, alike = ((results / f"shapes-unet/{data}/comparison.txt").read_text() for data in ("shapes", "coco"))
    assert "WARNING: steps: 20 and 30" in forced
    assert "WARNING" not in alike


def test_every_command_ends_with_how_far(results, capsys):
    visualize_results.main(["--results_dir", str(results), "--tolerance", "0.1"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("How far? structured pruning of shapes-unet stays within 10 % of dense")


@pytest.mark.parametrize(("arguments", "words"), [
    (["--methods", "structred"], "did you mean 'structured'"),
    (["--methods", "iterative"], "no record of the method iterative"),
    (["--methods", "magnitude", "--compare"], "two methods"),
    (["--results_file", "none.json"], "cannot read none.json"),
    (["--results_dir", "none"], "no folder none"),
])
def test_bad_input_is_one_line_and_draws_nothing(results, arguments, words):
    with pytest.raises(UserError, match=words) as raised:
        visualize_results.main(["--results_dir", str(results), *arguments])
    assert "\n" not in str(raised.value)
    assert pictures(results) == []


def test_two_records_of_the_same_rate_are_refused(results):
    first = record_path(results, "shapes-unet", "coco", "magnitude")
    (first.parent / "copy.json").write_bytes(first.read_bytes())
    with pytest.raises(UserError, match="both hold rate 0.1 of magnitude"):
        visualize_results.main(["--results_dir", str(results)])


def test_parts_of_a_sweep_that_land_in_one_folder_are_drawn_and_merged_as_one(tmp_path, capsys):
    whole = make_record(rates=(0.1, 0.2, 0.3))
    for part, rates in (((1, 2), (0.1, 0.3)), ((2, 2), (0.2,))):
        points = [point for point in whole.points if point.rate in rates]
        path = record_path(tmp_path, whole.model, whole.dataset, whole.method, part)
        write_record(dataclasses.replace(whole, points=points), path)
    visualize_results.main(["--results_dir", str(tmp_path)])
    assert "rate 0.2, which has 96.6 % of dense" in capsys.readouterr().out
    merge_results.main(["--results_dir", str(tmp_path)])
    merged = record_path(tmp_path, whole.model, whole.dataset, whole.method)
    assert read_record(merged) == read_record(written_alone(whole, tmp_path / "alone"))
    assert [path.name for path in merged.parent.glob("*.json")] == ["magnitude.json"]


def written_alone(record, folder):
    write_record(record, folder / "r.json")
    return folder / "r.json"


def test_parts_that_were_measured_differently_are_not_merged(tmp_path):
    for part, images in (((1, 2), 32), ((2, 2), 16)):
        record = make_record(rates=(0.1 * part[0],), images=images)
        write_record(record, record_path(tmp_path, record.model, record.dataset, record.method, part))
    with pytest.raises(UserError, match="samples: 32 and 16"):
        merge_results.main(["--results_dir", str(tmp_path)])
    assert len(list(tmp_path.rglob("*.json"))) == 2


def test_drawing_starts_without_torch_from_any_folder(tmp_path):
    (tmp_path / "broken.json").write_text(json.dumps({"schema_version": 9}))
    script = str(ROOT / "pruning" / "visualize_results.py")
    code = ("import runpy, sys\n"
            f"sys.argv = [{script!r}, '--results_file', 'broken.json']\n"
            "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "except SystemExit as stop:\n    assert stop.code == 2\n"
            "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=str(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1
    assert "broken.json" in done.stderr
    assert "schema_version is 9" in done.stderr
