"""Figures, tables and sentences: higher is better, gaps stay gaps, and the words say what the numbers say."""
import dataclasses
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from pruning import UserError, merge_results, visualize_results
from pruning.methods import METHODS, default_options
from pruning.metrics import METRICS
from pruning.metrics.intervals import mean_interval
from pruning.records import comparisons, drawing, findings, grids, palette, plots, report, summaries, tables
from pruning.records.answers import answer, lead
from pruning.records.record import Notes, Point, Record, read_record, record_path, write_record
from pruning.records.store import image_file
from pruning.records.words import percent

RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
CLIP = {  # mean scores at 0, 0.1 ... 0.9
    "magnitude": (83.0, 83.1, 80.2, 79.0, 70.0, 60.4, 16.4, 0.5, -5.5, 6.9),
    "structured": (83.0, 76.0, 58.0, 31.0, 12.0, 6.0, 4.0, 2.0, 5.0, 3.0),
    "iterative": (83.0, 82.9, 82.9, 82.5, 81.8, 80.1, 76.0, 66.0, 40.0, 10.0),
    "attention_heads": (83.0, 82.0, 79.5, 74.0, 66.0, 55.0, 43.0, 36.0, 30.0, 27.0),
}
MASKS = ("magnitude", "iterative")


def make_record(method="magnitude", rates=RATES, clip=None, images=32, model="shapes-unet", dataset="shapes", noise=1,
                **options):
    """Make a plausible record. clip: mean scores, dense first; noise: of the paired differences between rates."""
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
            file_bytes=2 * kept, ratio_intervals={} if not rate else {
                "denoiser_seconds": [0.97 * (kept / 5_300_628) ** 0.5, 1.02 * (kept / 5_300_628) ** 0.5],
                "image_seconds": [0.98 * (kept / 5_300_628) ** 0.3, 1.01 * (kept / 5_300_628) ** 0.3]},
            metrics=metrics, seconds={"prune": 0.1, "generate": 5.5, "measure": 0.8}, per_image=per_image,
            intervals={}, floors={} if rate else {"fid": 1.5, "kid": 0.2})

    points = [point(rate, score) for rate, score in zip((0.0, *rates), clip)]
    for each in points:
        for name, values in each.per_image.items():
            base = 0 if name == "lpips_dense" else np.array(points[0].per_image[name], float)
            each.intervals[name] = mean_interval(np.array(values, float) - base)
    return Record(
        model=model, dataset=dataset, method=method,
        options={**(default_options(method) if method in METHODS else {}), **options},
        samples=[{"id": f"prompts-{i:05d}", "caption": f"a large red cross above a small triangle on beige, {i}"}
                 for i in range(images)],
        settings={"seed": 0, "seeds": 1, "steps": 20, "guidance_scale": 4.0, "batch_size": 32, "dtype": "float32",
                  "configs": f"those of {model}", "image_size": 64, "device": "cpu", "threads": 2,
                  "metrics": list(points[0].metrics),
                  "metric_backbones": "bundled"},
        backbones={"clip_score": "bundled shapes-clip", "fid": "bundled shapes-squeezenet (64 outputs)",
                   "lpips": "bundled shapes-squeezenet (unweighted)",
                   "lpips_dense": "bundled shapes-squeezenet (unweighted)"},
        notes=Notes(reference_images=2048, feature_sizes={"features": 64}),
        versions={"python": "3.11.7", "torch": "2.15.0", "diffusers": "0.42.0", "transformers": "5.23.0"},
        dense=points[0], points=points[1:])


def flat(text):
    """Return a text without its line breaks, which may fall anywhere."""
    return " ".join(text.split())


def drawn_text(draw, monkeypatch, tmp_path):
    """Return all text in a figure, without line breaks."""
    figures = []
    monkeypatch.setattr(drawing, "save_svg", lambda figure, path: None)
    for module in (plots, grids, comparisons, drawing):
        if hasattr(module, "save_png"):
            monkeypatch.setattr(module, "save_png", lambda figure, path: figures.append(figure) or path)
    draw(tmp_path / "x.png")
    return flat(" ".join(text.get_text() for text in dict.fromkeys(figures[0].findobj(Text))))  # each text once


@pytest.fixture
def metric(monkeypatch):
    """Return a function that adds an entry to METRICS, and its values to a record."""
    def add(record, name, values, **fields):
        entry = {"help": "a test", "better": "lower", "per_image": True, "against": "dense", "interval": "value"}
        monkeypatch.setitem(METRICS, name, METRICS["lpips_dense"]._replace(**{**entry, **fields}))
        for point, value in zip((record.dense, *record.points), values):
            point.metrics[name], point.intervals[name] = value, [value - 0.05, value + 0.05]
        return record
    return add


def keep_metrics(record, *names):
    for point in (record.dense, *record.points):
        point.metrics = {name: value for name, value in point.metrics.items() if name in names}
        point.per_image = {name: value for name, value in point.per_image.items() if name in names}
        point.intervals = {name: value for name, value in point.intervals.items() if name in names}
    return record


def save_images(folder, record, positions, rates):
    """Save one plain picture each: red goes with the rate, green with the position."""
    for rate in rates:
        for k in positions:
            path = image_file(folder / "images", record.variant, rate, k)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), (round(200 * rate), 20 * k, 90)).save(path)


@pytest.mark.parametrize(("metric", "worse", "dense", "better"), [
    ("clip_score", 40, 80, 81), ("fid", 40, 10, 9), ("lpips", 0.8, 0.4, 0.3), ("lpips_dense", 0.2, 0.0, -0.1),
    ("ssim_dense", 0.8, 1.0, 1.1)])
def test_higher_is_better_for_every_relative_metric_and_dense_is_1(metric, worse, dense, better):
    assert findings.relative(metric, dense, dense) == 1
    assert findings.relative(metric, worse, dense) < 1 < findings.relative(metric, better, dense)


def test_each_metric_is_normalised_as_its_label_says():
    assert [findings.formula(name) for name in ("clip_score", "fid", "lpips_dense", "ssim_dense")] == [
        "clip_score ÷ dense", "dense ÷ fid", "1 − lpips_dense", "ssim_dense"]
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
    placed = drawing.spread(heights, [0.1] * len(heights))
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
    assert "32 images are too few to decide on the next rate, 0.3: it has 95.2 % of dense (95 % interval" in text
    assert "images would decide." in text
    surer = flat(summaries.summary(make_record("magnitude", noise=0.1)))
    assert "The next rate, 0.4, does not: it has 84.3 % of dense (95 % interval" in surer


def test_the_summary_of_masks_says_that_zeros_gain_nothing():
    text = flat(summaries.summary(make_record("magnitude")))
    assert "first falls below 50 % of dense at rate 0.6" in text
    assert "zeros neither shrink it nor make dense kernels faster" in text
    assert "no difference in time can be told: a denoiser call takes 0.97 to 1.02 times as long" in text
    assert "still holds all 5,300,628 parameters (21.2 MB in memory and 10.6 MB in a saved file)" in text
    assert ("fid is biased upward for few images. It compares 32 images with 2,048 reference images by 64 features; as "
            "many real images score 1.5.") in text
    assert "With fewer images than features, fid says almost nothing: read kid instead." in text


def test_the_summary_of_removal_says_what_was_gained():
    text = flat(summaries.summary(make_record("attention_heads")))
    assert "up to rate 0.2" in text
    assert ("at rate 0.2, parameters fall from 5,300,628 to 4,916,628 (−7.2 %), weights from 21.2 MB in memory and "
            "10.6 MB in a saved file to 19.7 MB in memory and 9.8 MB in a saved file") in text
    assert "at rate 0.9, parameters fall from 5,300,628 to 3,572,628 (−32.6 %)" in text
    assert "a denoiser call takes 0.82 times as long as dense (95 % interval 0.80 to 0.84), an image 0.89 times" in text
    assert "zeros" not in text


def test_the_table_has_a_row_a_rate_and_shows_what_is_not_finite():
    record = make_record()
    record.points[8].metrics["fid"] = None
    quality = summaries.summary(record).partition("\nCost\n")[0]
    rows = [line.split() for line in quality.splitlines()]
    table = {row[0]: row for row in rows if row and row[0] in ("dense", *map(str, RATES))}
    assert list(table) == ["dense", *map(str, RATES)]
    assert table["0.5"][1:4] == ["0.500", "60.4", "±"]
    assert "–" not in table["0.8"]
    assert "–" in table["0.9"]
    assert "–: not finite" in summaries.summary(record)


def test_costs_are_those_of_the_record_and_times_are_ratios_with_their_intervals():
    record = make_record("structured")
    dense, point = record.dense, record.points[4]
    point.denoiser_seconds, point.dense_denoiser_seconds = 0.03, 0.04
    point.image_seconds, point.dense_image_seconds = 0.5, 0.25
    point.ratio_intervals = {"denoiser_seconds": [0.7, 1.1], "image_seconds": [1.9, 2.2]}
    costs = summaries.summary(record).partition("\nCost\n")[2].splitlines()
    row = next(line.split(maxsplit=7) for line in costs if line.split()[:1] == ["0.5"])
    shown = [point.parameters / 1e6, point.nonzero_parameters / 1e6, point.weight_bytes / 1e6, point.file_bytes / 1e6,
             point.peak_bytes / 1e6, point.macs / 1e9]
    assert [float(value) for value in row[1:7]] == pytest.approx(shown, rel=1e-3)
    assert row[7].split("  ") == ["no difference", "2.00 (1.90 to 2.20)"]
    point.ratio_intervals = {}  # of an earlier version
    assert [tables.time_cell(name, point, dense) for name in findings.TIMES] == ["0.75", "2.00"]
    assert "this record does not say how sure these ratios are" in flat(summaries.summary(
        dataclasses.replace(record, points=[point])))


def test_the_ratio_of_a_mask_without_an_interval_is_noise_and_left_out(monkeypatch, tmp_path):
    record = make_record("magnitude", rates=(0.1, 0.8))
    for point in record.points:
        point.ratio_intervals, point.denoiser_seconds, point.file_bytes = {}, 1.8 * point.dense_denoiser_seconds, None
    text = summaries.summary(record)
    assert "1.80" not in text
    assert "times as long" not in text
    assert "masks do the same work as dense, so their ratios are left out" in flat(text)
    drawn = drawn_text(lambda path: plots.draw_cost(record, path), monkeypatch, tmp_path)
    assert "The records hold no intervals of times" in drawn
    assert "time of a denoiser call" not in plots.bars(record.points[0], record.dense)
    assert "hold no intervals" not in drawing.ratio_note([make_record()])
    assert "The records of magnitude hold no intervals" in drawing.ratio_note([record, make_record("iterative")])


def test_modules_that_a_method_cannot_prune_are_named_with_the_reason():
    record = make_record("attention_heads")
    assert "Not pruned" not in summaries.summary(record)
    modules = {"a.attn1": "its class NewAttention is not known", "b.attn2": "its processor is Odd",
               "c.attn1": "its class NewAttention is not known"}
    for point in record.points:
        point.skipped_modules = modules
    assert ("Not pruned: its class NewAttention is not known (2 modules: a.attn1, c.attn1); its processor is Odd "
            "(1 module: b.attn2).") in flat(summaries.summary(record))


def test_the_share_of_the_parameters_that_a_method_reaches_is_said_and_what_the_others_are():
    record = make_record("attention_heads")
    assert "can reach" not in summaries.summary(record)
    total, last = record.dense.parameters, record.points[-1]
    last.unreached = {"neurons": total // 2, "its class Odd is not known": total // 4, "biases": 1}
    last.skipped_modules = {f"blocks.{n}.odd": "its class Odd is not known" for n in range(4)}
    last.inexact = {"blocks.0.attn": "its norm_q runs across all heads"}
    text = flat(summaries.summary(record))
    assert ("attention_heads can reach 25.0 % of the parameters. The others: 50.0 % neurons; 25.0 % its class Odd is "
            "not known (4 modules: blocks.0.odd, blocks.1.odd, blocks.2.odd, …); below 0.1 % biases.") in text
    assert "Removing differs from masking: its norm_q runs across all heads (1 module: blocks.0.attn)." in text


def test_times_of_rates_at_which_compilation_fell_back_are_told_apart(monkeypatch, tmp_path):
    record = make_record(rates=(0.1, 0.2, 0.3))
    for point, compiled in zip((record.dense, *record.points), (True, False, True, False)):
        point.compiled = compiled
    words = "torch.compile fell back to plain execution for magnitude at rates 0.1 and 0.3"
    assert words in flat(summaries.summary(record))
    assert words in drawn_text(lambda path: plots.draw_cost(record, path), monkeypatch, tmp_path)
    assert "torch.compile" not in summaries.summary(make_record())


@pytest.mark.parametrize(("record", "words"), [
    (make_record(clip=(0.0, 1.0), rates=(0.1,)), "unknown, because clip_score of the dense model is 0"),
    (make_record(clip=(None, 1.0), rates=(0.1,)), "unknown, because clip_score of the dense model is –"),
    (keep_metrics(make_record(), "fid"), "unknown, because clip_score was not measured"),
    (make_record(clip=(80, 50), rates=(0.1,)), "no measured rate stays within 5 % of dense by clip_score; rate "
                                               "0.1 has 62.5 % of dense"),
    (make_record(rates=(0.1, 0.2)), "does not fall below 50 % of dense up to rate 0.2"),
    (make_record(clip=(80, 79, None, 10), rates=(0.1, 0.2, 0.3)), "Collapse: clip_score is not finite at rate 0.2"),
    (make_record(images=4), "unknown, because there are 4 samples and a 95 % interval needs 5"),
    (make_record(rates=()), "no rate has been measured yet"),
], ids=lambda x: x[:30] if isinstance(x, str) else "")
def test_the_summary_claims_no_more_than_was_measured(record, words):
    assert words in flat(summaries.summary(record))


def test_too_few_images_decide_nothing_and_the_answer_says_how_many_would():
    """One image of 8 lost 17.5 points: it may be one of many, or one of few."""
    record = make_record(rates=(0.3,), clip=(80, 78), images=8)
    dense, point = record.dense, record.points[0]
    lost = np.array([0.1, -0.2, 0.3, 0, 0.2, -0.1, 0.1, 17.5])
    point.per_image["clip_score"] = list(np.array(dense.per_image["clip_score"]) - lost)
    point.metrics["clip_score"] = 80 - lost.mean()
    point.intervals["clip_score"] = mean_interval(-lost)
    assert findings.holds(point, dense, 0.05) is None
    assert answer(record) == (
        "How far? magnitude pruning of shapes-unet: 8 images are too few to decide whether rate 0.3 stays within 5 % "
        "of dense by clip_score. It has 97.2 % of dense (95 % interval 84.3 to 103.6; 1 of 8 images loses over 5 %, "
        "the worst 22 %); about 270 images would decide.")
    record.settings["seeds"] = 2
    record.samples = record.samples[:4]
    assert "unknown, because there are 4 samples" in answer(record)
    near = make_record(rates=(0.3,), clip=(80, 76), images=8)  # no number of images tells the mean from the limit
    assert "too few to decide whether rate 0.3" in answer(near)
    assert "; more than 10,000 images would decide." in answer(near)
    near.points[0].per_image = {}
    assert "too few to decide whether rate 0.3" in answer(near)
    assert "; more would decide." in answer(near)


def test_an_image_that_is_not_finite_fails_and_leaves_nothing_to_decide():
    record = make_record(rates=(0.1, 0.2), clip=(80, 80, None))
    record.points[1].per_image["clip_score"] = [None, *record.points[0].per_image["clip_score"][1:]]
    record.points[1].intervals["clip_score"] = None
    assert findings.holds(record.points[1], record.dense, 0.05) is False
    assert findings.failures(record.points[1], record.dense, 0.05) == (1, 1.0)
    assert "The next rate, 0.2, does not: it has no finite clip_score." in answer(record)


def test_images_that_fail_are_counted_beside_the_mean():
    record = make_record(rates=(0.1, 0.2), clip=(80, 79.5, 78), noise=0.5)
    values = record.points[0].per_image["clip_score"]
    for k, loss in ((3, 8.0), (20, 13.6), (31, 5.0)):  # 10, 17 and 6 % of 80
        values[k] = record.dense.per_image["clip_score"][k] - loss
    assert findings.failures(record.points[0], record.dense, 0.05) == (3, pytest.approx(0.17))
    assert findings.failures(record.points[0], record.dense, 0.08) == (2, pytest.approx(0.17))
    assert findings.failures(record.dense, record.dense, 0.05) == (0, 0)
    alone = dataclasses.replace(record, points=record.points[:1])
    assert findings.worst_images(alone, 2) == (record.points[0], [20, 3])
    assert "; 3 of 32 images lose over 5 %, the worst 17 %) and" in answer(alone)
    assert "; no image loses over 20 %) and" in answer(record, 0.2)
    assert tables.failures_cell(record.points[0], record.dense, 0.05) == "3, −17 %"
    row = next(line for line in summaries.summary(record).splitlines() if line.split()[:1] == ["0.1"])
    assert row.endswith(" 3, −17 %")
    comparison = summaries.comparison_summary([record, make_record("iterative", rates=(0.1, 0.2))])
    assert "images that lose over 5 % of clip_score, and the largest loss" in comparison
    beside = ["images that lose over 5 % of clip_score", "0", "3, −17 %", "lower", ""]
    assert beside in tables.single_rate_table(record).rows
    record.dense.per_image = {}
    assert findings.failures(record.points[0], record.dense, 0.05) is None
    assert "lose over" not in summaries.summary(record)


def test_methods_are_compared_where_they_save_the_same_and_not_at_equal_rates():
    records = [make_record(name) for name in CLIP]
    text = summaries.comparison_summary(records)
    macs, parameters, times = (text.partition(f"at equal shares of {what}")[2].partition("\n\n")[0].splitlines()
                        for what in findings.SAVED)
    best = {line.split()[0]: line.split(maxsplit=1)[1] for line in parameters if line.startswith("   ")}
    assert best["0.1"] == "iterative; magnitude may be as good"
    assert best["0.5"] == "iterative"
    assert best["0.8"].startswith("iterative")  # attention_heads leads at rate 0.9, where it saves 0.33
    assert not any("attention_heads" in best[level] for level in ("0.4", "0.5", "0.6", "0.7", "0.8"))
    assert [line.strip() for line in macs if line.startswith("   ")] == [
        "0.1  attention_heads", "0.2  attention_heads; all are below 50 % of dense"]  # masks save none
    assert "attention_heads (no other was measured there)" in summaries.comparison_summary(
        [records[0], make_record("attention_heads")])
    assert "structured pruning of shapes-unet: no measured rate stays within 5 %" in text
    assert "iterative pruning of shapes-unet stays within 5 % of dense by clip_score up to rate 0.5" in flat(text)
    noisy = summaries.comparison_summary([make_record(name, noise=40) for name in CLIP])
    assert "0.1  iterative; magnitude and attention_heads may be as good" in noisy


def test_between_measured_rates_the_values_of_each_image_are_interpolated():
    record = make_record("attention_heads", rates=(0.4, 0.8))
    low, high = (findings.saved_parameters(point, record.dense) for point in record.points)
    found = findings.at_saving(record, findings.saved_parameters, 0.75 * low + 0.25 * high)
    values = [np.array(point.per_image["clip_score"]) for point in record.points]
    assert found.mean == pytest.approx(0.75 * 82.0 + 0.25 * 79.5)
    assert found.values == pytest.approx(0.75 * values[0] + 0.25 * values[1])
    assert findings.at_saving(record, findings.saved_parameters, high + 0.01) is None
    assert findings.at_saving(record, findings.saved_parameters, high).mean == pytest.approx(79.5)
    assert findings.at_saving(make_record("magnitude"), findings.saved_macs, 0.1) is None
    far = make_record("magnitude", rates=(0.1, 0.4), clip=(83, 83, 79))  # too far apart for a straight line
    assert findings.at_saving(far, findings.saved_parameters, 0.2) is None
    record.points[1].metrics["clip_score"] = None
    assert math.isnan(findings.at_saving(record, findings.saved_parameters, high).mean)


def test_what_another_noise_seed_changes_is_told_and_drawn(tmp_path):
    record = make_record(rates=(0.1, 0.2))
    plots.draw_metrics(record, tmp_path / "without.png")
    record.dense.seed_spread = {"lpips_dense": 0.3, "clip_score": 0.8, "kid": None}
    plots.draw_metrics(record, tmp_path / "with.png")
    assert ("Noise: another noise seed alone changes the dense model by clip_score 0.8, lpips_dense 0.3 (clip_score: "
            "standard deviation of the difference between two seeds). Smaller differences are noise."
            ) in flat(summaries.summary(record))
    assert (tmp_path / "without.png").read_bytes() != (tmp_path / "with.png").read_bytes()


# ---- what an entry of METRICS decides

def test_a_metric_relative_to_dense_is_drawn_and_described_as_its_entry_says(metric, monkeypatch, tmp_path):
    record = metric(make_record(rates=(0.1, 0.2)), "colour_shift", (0.0, 0.25, 0.5), relative="1 - value")
    assert findings.relative_curve(record, "colour_shift") == [1, 0.75, 0.5]
    text = drawn_text(lambda path: plots.draw_accuracy(record, path), monkeypatch, tmp_path)
    assert "1 − colour_shift" in text
    assert "says nothing: kid." in text
    assert "(clip_score and lpips: of the paired difference to dense)" in text
    assert "colour_shift ↓ lower is better: a test" in summaries.summary(record)
    record.dense.seed_spread = {"colour_shift": 0.125}
    assert drawing.noise_levels(record, "colour_shift") == {"another seed": [0.125]}  # a distance, not around dense


def test_a_metric_whose_share_of_dense_says_nothing_is_drawn_in_panels_only(metric, monkeypatch, tmp_path):
    record = metric(make_record(rates=(0.1, 0.2)), "sharpness", (20.0, 15.0, 10.0), relative="", better="higher",
                    against="", interval="difference")
    accuracy = drawn_text(lambda path: plots.draw_accuracy(record, path), monkeypatch, tmp_path)
    assert "says nothing: kid, sharpness." in accuracy
    assert accuracy.count("sharpness") == 1
    panels = drawn_text(lambda path: plots.draw_metrics(record, path), monkeypatch, tmp_path)
    assert "sharpness ↑ higher is better" in panels
    assert "(clip_score, lpips and sharpness: of the paired difference to dense)" in panels
    record.dense.seed_spread, record.dense.floors = {"sharpness": 2.0}, {"sharpness": 1.0}
    assert drawing.noise_levels(record, "sharpness") == {"another seed": [18, 22]}  # and no floor without a reference


def test_a_metric_that_is_a_cost_is_no_accuracy(metric, monkeypatch, tmp_path):
    record = metric(make_record(rates=(0.1,)), "energy", (5.0, 4.0), cost=True, relative="ratio")
    assert "energy" not in drawn_text(lambda path: plots.draw_accuracy(record, path), monkeypatch, tmp_path)
    assert "energy" in drawn_text(lambda path: plots.draw_metrics(record, path), monkeypatch, tmp_path)


def test_a_biased_metric_is_left_out_and_named_if_there_are_fewer_images_than_features(metric, monkeypatch, tmp_path):
    record = metric(make_record(rates=(0.1,)), "style_distance", (2.0, 3.0), biased=True, against="reference",
                    backbone="clip", relative="ratio")
    record.dense.floors["style_distance"] = 0.5
    assert not findings.unreliable(record, "style_distance")  # the record does not say how many features
    record.notes.feature_sizes["clip"] = 33
    assert findings.unreliable(record, "style_distance")
    for draw in (plots.draw_metrics, plots.draw_accuracy):
        text = drawn_text(lambda path, draw=draw: draw(record, path), monkeypatch, tmp_path)
        assert "style_distance is left out: 32 images are fewer than its 33 features." in text
        assert text.count("style_distance") == 1
    assert "by 33 features; as many real images score 0.5." in flat(summaries.summary(record))
    assert drawing.noise_levels(record, "style_distance") == {"real images": [0.5]}
    record.notes.feature_sizes["clip"] = 32
    assert not findings.unreliable(record, "style_distance")
    text = drawn_text(lambda path: plots.draw_accuracy(record, path), monkeypatch, tmp_path)
    assert "dense ÷ style_distance" in text


@pytest.mark.parametrize("change", [
    lambda record: record.dense.metrics.update(clip_score=None),
    lambda record: record.dense.seed_spread.update(clip_score=None, nothing=1.0),
    lambda record: record.dense.floors.update(fid=None, clip_score=3.0, nothing=1.0),
    lambda record: setattr(record, "notes", Notes()),
    lambda record: record.settings.pop("batch_size"),
], ids=["dense is null", "seeds", "floors", "no notes", "no batch size"])
def test_odd_notes_that_are_read_are_drawn_too(tmp_path, change):
    record, other = (keep_metrics(make_record(name, rates=(0.1,)), "clip_score", "fid") for name in list(CLIP)[:2])
    record.dense.seed_spread = {"clip_score": 0.8}
    change(record)
    write_record(record, tmp_path / "r.json")
    record = read_record(tmp_path / "r.json")
    report.write_record_files(record, tmp_path, tmp_path / "images")
    report.write_comparison({tmp_path / "r.json": record, tmp_path / "other.json": other}, tmp_path)


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
    written = report.write_record_files(record, tmp_path, tmp_path / "images")
    ends = [".png", "_metrics.png", *(["_cost.png"] if record.points else []), ".txt"]  # and no figure of no image
    assert [path.name for path in written] == [f"{record.variant}{end}" for end in ends]
    figures = written[:-1]
    assert sorted(tmp_path.iterdir()) == sorted([*written, *(path.with_suffix(".svg") for path in figures)])
    for path in figures[:2]:
        with Image.open(path) as image:
            assert image.width == 1660
            assert len(np.unique(np.asarray(image.convert("L")))) > 20


def test_images_are_drawn_captions_down_and_rates_across_and_the_worst_below(monkeypatch, tmp_path):
    record = make_record(rates=(0.5,), scope="global")
    values = record.points[0].per_image["clip_score"]
    for k in (7, 9, 2):  # the worst first
        values[k] = record.dense.per_image["clip_score"][k] - 60 - k * (k > 2)
    values[7] -= 20
    save_images(tmp_path, record, range(12), (0.0, 0.5))
    (tmp_path / "images/magnitude+scope=global/0.5/0001.png").unlink()
    assert grids.draw_images(record, tmp_path / "images", tmp_path / "x.png") == tmp_path / "x.png"
    with Image.open(tmp_path / "x.png") as image:
        pixels = np.asarray(image.convert("RGB"))

    def place(rate, k):
        y, x = np.nonzero((np.abs(pixels.astype(int) - (round(200 * rate), 20 * k, 90)) <= 4).all(-1))
        return (np.median(x), np.median(y)) if len(x) > 500 else None
    assert place(0.0, 0)[0] < place(0.5, 0)[0]  # rates across
    assert place(0.0, 0)[1] < place(0.0, 1)[1] < place(0.0, 5)[1]  # captions down
    assert place(0.0, 5)[1] < place(0.5, 7)[1] < place(0.5, 9)[1]  # the two that lose most
    assert place(0.5, 1) is None  # the missing one is left out
    assert [k for k in range(12) if place(0.0, k)] == [0, 1, 2, 3, 4, 5, 7, 9]
    text = drawn_text(lambda path: grids.draw_images(record, tmp_path / "images", path), monkeypatch, tmp_path)
    assert "Right: how much clip_score the image loses at rate 0.5; the last 2 lose most of all." in text
    lost = findings.losses(record.points[0], record.dense)
    assert re.findall("−[0-9]+ %", text)[-2:] == [f"−{100 * lost[k]:.0f} %" for k in (7, 9)]
    keep_metrics(record, "fid")
    assert grids.shown_images(record) == [0, 1, 2, 3, 4, 5]


def test_a_broken_image_is_named_and_nothing_is_written(tmp_path):
    record = make_record(rates=(0.5,))
    save_images(tmp_path, record, range(1), (0.0,))
    (tmp_path / "images/magnitude/dense/0000.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(UserError, match="0000.png"):
        report.write_record_files(record, tmp_path, tmp_path / "images")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_a_record_with_an_unknown_metric_is_one_line_and_nothing_is_written(tmp_path):
    record = make_record(rates=(0.5,))
    save_images(tmp_path, record, range(1), (0.0,))
    for point in (record.dense, *record.points):
        point.metrics["clip_scor"] = 1.0
    with pytest.raises(UserError, match="unknown metric 'clip_scor', did you mean 'clip_score'"):
        report.write_record_files(record, tmp_path, tmp_path / "images")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_one_function_and_one_entry_make_one_more_file_of_every_record(texts_only, tmp_path, monkeypatch):
    def write_rates(record, path, images_folder, tolerance):
        return report.write_text(f"{[point.rate for point in record.points]} {images_folder.name} {tolerance}", path)
    monkeypatch.setitem(report.RECORD_FILES, "{variant}_rates.csv", write_rates)
    record = make_record(rates=(0.1, 0.2), scope="global")
    written = report.write_record_files(record, tmp_path, tmp_path / "images", 0.1)
    assert written[-1] == tmp_path / "magnitude+scope=global_rates.csv"
    assert written[-1].read_text() == "[0.1, 0.2] images 0.1"
    assert sorted(tmp_path.iterdir()) == sorted(written)


def test_one_rate_and_dense_stand_side_by_side():
    record = make_record("structured", rates=(0.3,), round_to=8)
    record.points[0].metrics["fid"] = None
    table = tables.single_rate_table(record)
    assert table.header[1:3] == ["dense", "structured+round_to=8 0.3"]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["sparsity (neurons and channels)"] == ["0.0000", "0.3000", "", ""]
    assert rows["parameters"][:2] == ["5,300,628", "4,724,628"]
    assert rows["clip_score (100·cos)"][:3] == ["83", "76", "higher"]
    assert [float(end) for end in rows["clip_score (100·cos)"][3].split(" to ")] == pytest.approx(
        findings.interval("clip_score", record.points[0], record.dense), rel=1e-3)
    assert rows["fid"][:2] == ["14", "not finite"]
    assert "4,724,628" in str(table)
    assert tables.single_rate_table(make_record(rates=())).header[2] == "magnitude 0"


def test_the_names_of_lines_do_not_touch():
    figure = Figure(figsize=(4.8, 2.9), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1])
    lines = palette.lines_of(list(METHODS))
    drawing.label_ends(figure, (axes, [(1, 0.5, name, lines[name]) for name in METHODS]))
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert len(boxes) == len(METHODS)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(box.x1 <= figure.bbox.x1 for box in boxes)


# ---- lines and their colours

# A colour as protanopes and deuteranopes see it, on linear RGB (Machado et al., 2009, severity 1).
EYES = {"normal": np.eye(3),
        "protanope": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                      [-0.003882, -0.048116, 1.051998]],
        "deuteranope": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                        [-0.011820, 0.042940, 0.968881]]}


def seen(colour, eyes):
    """Return a colour in CIELAB as the eyes see it."""
    rgb = np.array(to_rgb(colour))
    linear = np.clip(np.array(EYES[eyes]) @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4), 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    x, y, z = (np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in xyz / (0.9505, 1, 1.089))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eyes", EYES)
def test_lines_of_a_figure_differ_for_all_eyes_and_from_white(eyes):
    first = list(palette.LINES).index("clip_score")  # methods come first, then metrics
    methods, metrics = list(palette.LINES)[:first], list(palette.LINES)[first:]
    assert {name for name, metric in METRICS.items() if metric.relative and not metric.cost} <= set(metrics)
    for lines, least in (([palette.LINES[name] for name in methods], 20),
                         ([palette.LINES[name] for name in metrics], 30), (palette.SPARE, 20)):
        colours = [seen(line.colour, eyes) for line in lines]
        for i, colour in enumerate(colours):
            assert colour[0] < 75  # of a lightness up to 100
            assert all(np.linalg.norm(colour - other) >= least for other in colours[:i])


def test_the_default_variant_of_a_method_keeps_its_line_whatever_else_is_drawn():
    magnitude, other, iterative = make_record(), make_record(scope="global"), make_record("iterative")
    alone, together = palette.variant_lines([iterative]), palette.variant_lines([other, magnitude, iterative])
    assert alone["iterative"] == together["iterative"]
    assert together["magnitude"] != together["magnitude+scope=global"]
    assert together["magnitude+scope=global"].colour not in [line.colour for line in palette.LINES.values()]


def test_many_lines_stay_different():
    assert len(set(palette.lines_of([f"v{i}" for i in range(10)]).values())) == 10


def test_solid_is_removed_and_dashed_is_zeroed_whatever_the_method():
    records = [make_record("structured", rates=(0.3,)), make_record("magnitude", rates=(0.3,)), masked()]
    lines = palette.variant_lines(records)
    assert [lines[record.variant].dashes for record in records] == ["-", "--", "--"]


def masked():
    """A record of a method that removes, whose units were zeroed in place."""
    record = make_record("structured", rates=(0.3,), mask_only=True)
    for point in record.points:
        point.nonzero_parameters, point.parameters = point.parameters, record.dense.parameters
    return record


# ---- what a figure claims

def test_nothing_is_claimed_between_rates_that_are_far_apart():
    axes = Figure().add_subplot()
    x, y = (0, 0.1, 0.2, 0.7, 0.8), (1, 1, 0.9, 0.5, 0.3)
    drawing.curve(axes, x, y, [(value - 0.1, value + 0.1) for value in y], palette.LINES["joint"])
    bands = [path.vertices[:, 0] for each in axes.collections if isinstance(each, PolyCollection)
             for path in each.get_paths()]
    assert [(min(xs), max(xs)) for xs in bands] == [(0, 0.2), (0.7, 0.8)]
    pale = [line.get_xdata().tolist() for line in axes.lines if (line.get_alpha() or 1) < 0.5]
    assert pale == [[0.2, 0.7]]


def test_a_line_ends_where_it_leaves_the_panel():
    assert drawing.end_of([0, 0.2, 0.4], [1, 0.8, 0.4], bottom=0.6) == pytest.approx((0.3, 0.6))
    assert drawing.end_of([0, 0.2, 0.4], [1, 0.8, math.nan], bottom=0.6) == (0.2, 0.8)
    assert math.isnan(drawing.end_of([0, 0.2], [math.nan] * 2)[1])


def axes_named(figure, label):
    return next((axes for axes in figure.findobj(Axes) if axes.get_xlabel().startswith(label)), None)


def badges(axes):
    """Return the place and the text of each large mark."""
    return {(*map(float, text.xy), text.get_text()) for text in axes.texts if text.get_bbox_patch()}


def test_the_large_mark_stands_at_the_rate_of_the_answer_on_every_frontier():
    removing, zeroing, fallen = make_record("attention_heads", noise=0.1), make_record("iterative"), make_record(
        "structured")
    records = [removing, zeroing, fallen]
    figure = comparisons.draw_frontiers(records, 0.05, "")
    assert findings.last_good(fallen) is None
    for what, marked in (("multiply", [removing]), ("parameters", [removing, zeroing]), ("image time", [removing])):
        share = next(share for name, share in findings.SAVED.items() if name.startswith(what))
        expected = {(share(good, record.dense), good.metrics["clip_score"] / record.dense.metrics["clip_score"],
                     f"{good.rate:g}") for record in marked for good in [findings.last_good(record)]}
        assert badges(axes_named(figure, what)) == expected
    assert f"up to rate {findings.last_good(removing).rate:g}," in answer(removing)


def test_a_variant_that_is_far_better_than_dense_is_drawn_at_the_top(tmp_path):
    record = make_record("attention_heads", rates=(0.1, 0.2), clip=(83, 90, 1e18))
    figure = comparisons.draw_frontiers([record], 0.05, "")
    axes = axes_named(figure, "parameters")
    assert [height for _, height, _ in badges(axes)] == [comparisons.HIGHEST]
    assert axes.get_ylim()[1] > comparisons.HIGHEST
    drawing.save_png(figure, tmp_path / "x.png")


def test_what_saves_nothing_or_falls_at_once_is_named_and_not_drawn():
    fallen = make_record("iterative", rates=(0.7,), clip=(83, 20))
    fallen.points[0].image_seconds = 0.09  # zeros save no time, whatever the clock says
    fallen.points[0].ratio_intervals["image_seconds"] = [0.89, 0.91]
    figure = comparisons.draw_frontiers([make_record("structured", rates=(0.2,)), fallen], 0.05, "")
    text = flat(" ".join(text.get_text() for text in figure.findobj(Text)))
    assert "Not drawn: iterative (no multiply-accumulates saved); iterative (no image time saved)." in text
    assert "Below 60 % at every measured rate: iterative." in text
    names = [text.get_text() for text in axes_named(figure, "parameters").texts]
    assert "structured" in names
    assert "iterative" not in names


@pytest.fixture
def baseline(monkeypatch):
    """Return a function that makes a record of a baseline, which saves time and nothing else."""
    def make(name, times, clip):
        monkeypatch.setitem(METHODS, name, SimpleNamespace(baseline=True, unit="steps", options={}, help="a test"))
        record = make_record(name, rates=tuple(times), clip=clip, noise=0.1)
        for point, ratio in zip(record.points, times.values()):
            for field in ("parameters", "nonzero_parameters", "weight_bytes", "file_bytes", "macs", "peak_bytes"):
                setattr(point, field, getattr(record.dense, field))
            point.image_seconds = ratio * point.dense_image_seconds
            point.ratio_intervals = {"image_seconds": [0.99 * ratio, 1.01 * ratio]}
        return record
    return make


def test_a_baseline_is_drawn_over_time_alone_and_figure_summary_and_report_say_if_it_saves_more(baseline):
    steps = baseline("steps", {0.25: 0.75, 0.5: 0.5}, (83, 83, 82.5))
    records = [make_record("attention_heads", noise=0.1), steps]
    for point in records[0].points:
        point.image_seconds, point.ratio_intervals["image_seconds"] = 0.8 * point.dense_image_seconds, [0.79, 0.81]
    good = findings.last_good(records[0])
    time, size = (percent(share(good, records[0].dense)) for share in (findings.saved_time, findings.saved_parameters))
    words = (f"Of the time of an image, steps at rate 0.5 saves 50 % and attention_heads at rate {good.rate:g} saves "
             f"{time}. For time alone, pruning is not the best choice. Only pruning makes the model smaller: "
             f"attention_heads at rate {good.rate:g} removes {size} of the parameters. Both can be used together.")
    figure = comparisons.draw_frontiers(records, 0.05, "")
    assert words in flat(" ".join(text.get_text() for text in figure.findobj(Text)))
    assert words in flat(summaries.comparison_summary(records))
    assert words in flat(lead(records))
    drawn = {what: "steps" in [text.get_text() for text in axes_named(figure, what).texts]
             for what in ("multiply", "parameters", "image time")}
    assert drawn == {"multiply": False, "parameters": False, "image time": True}
    assert palette.variant_lines(records)["steps"].dashes == "-."
    slower = [records[0], baseline("steps", {0.05: 0.95}, (83, 83))]
    assert "steps at rate 0.05 saves 5 %." in lead(slower)
    assert "not the best choice" not in lead(slower)
    assert "Of the time" not in lead(records[:1])
    zeros = make_record("magnitude", rates=(0.1,), clip=(83, 83), noise=0.1)
    zeros.points[0].image_seconds = 0.9 * zeros.points[0].dense_image_seconds  # whatever the clock says
    zeros.points[0].ratio_intervals["image_seconds"] = [0.89, 0.91]
    assert "saves 50 %; pruning saves none." in lead([zeros, baseline("steps", {0.5: 0.5}, (83, 83))])


def test_costs_are_drawn_at_the_safe_rate_and_at_the_rate_nearest_to_half_of_it(monkeypatch, tmp_path):
    record = make_record("attention_heads", rates=(0.05, 0.12, 0.2, 0.5), clip=(83, 83, 82.5, 82, 50), noise=0.1)
    text = drawn_text(lambda path: plots.draw_cost(record, path), monkeypatch, tmp_path)
    assert "costs at its safe rate 0.2, and at 0.12" in text
    point, dense = record.points[2], record.dense
    found = plots.bars(point, dense)
    assert "nonzero parameters" not in found
    assert found["parameters"].share == point.parameters / dense.parameters
    assert found["parameters"].text == "4.92 of 5.3 million"
    low, high = point.ratio_intervals["image_seconds"]
    assert found["time of an image"] == (point.image_seconds / point.dense_image_seconds, [low, high],
                                         f"{low:.2f} to {high:.2f}")
    mask = make_record("magnitude", rates=(0.3,), clip=(83, 20))
    assert plots.bars(mask.points[0], mask.dense)["nonzero parameters"].share == pytest.approx(0.73, abs=0.01)
    text = drawn_text(lambda path: plots.draw_cost(mask, path), monkeypatch, tmp_path)
    assert "at rate 0.3; no measured rate is safe" in text
    assert plots.draw_cost(make_record(rates=()), tmp_path / "x.png") is None


def test_at_most_ten_rates_of_images_are_shown_with_dense_the_last_and_the_safe_one():
    rates = tuple(n / 40 for n in range(1, 37))
    clip = (83, *(83 - 100 * max(0, rate - 0.46) for rate in rates))
    record = make_record("attention_heads", rates=rates, clip=clip)
    good = findings.last_good(record)
    shown = grids.shown_points(record, 0.05)
    assert len(shown) == 10
    assert (shown[0], shown[-1]) == (record.dense, record.points[-1])
    assert good in shown
    assert grids.shown_points(make_record(), 0.05) == findings.all_points(make_record())


def test_a_comparison_shows_one_caption_by_variants_and_rates_and_its_svg_has_no_images(tmp_path):
    found = {}
    for method in ("structured", "attention_heads"):
        record = make_record(method, rates=(0.1, 0.2))
        found[tmp_path / method / "r.json"] = record
        save_images(tmp_path / method, record, range(2), (0.0, 0.1, 0.2))
    caption, rows = grids.variant_rows(found, 0.05)
    assert caption == next(iter(found.values())).samples[0]["caption"]
    assert [row.left for row in rows] == ["structured", "attention_heads"]
    assert [row.heads for row in rows] == [["dense", "0.1", "0.2"]] * 2
    assert [row.framed for row in rows] == [None, 2]
    assert all(file.is_file() for row in rows for file in row.files)
    comparisons.draw_comparison(found, tmp_path / "with.png")
    elsewhere = {tmp_path / "none" / f"{record.variant}.json": record for record in found.values()}
    comparisons.draw_comparison(elsewhere, tmp_path / "without.png")
    with Image.open(tmp_path / "with.png") as images, Image.open(tmp_path / "without.png") as none:
        assert images.height > none.height
    assert (tmp_path / "with.svg").read_bytes() == (tmp_path / "without.svg").read_bytes()
    assert b"<image" not in (tmp_path / "with.svg").read_bytes()


# ---- files

def test_a_figure_is_a_palette_png_of_830_points_and_an_svg_that_is_always_the_same(tmp_path):
    record = keep_metrics(make_record(rates=(0.1, 0.2)), "clip_score")
    for name in ("a", "b"):
        plots.draw_accuracy(record, tmp_path / f"{name}.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg", "b.png", "b.svg"]
    with Image.open(tmp_path / "a.png") as image:
        assert (image.mode, image.width) == ("P", 2 * 830)
        corner = image.convert("RGB").getpixel((0, 0))
    assert corner == (255, 255, 255)  # readable on a dark page
    svg = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert svg == (tmp_path / "b.svg").read_text(encoding="utf-8")
    assert "magnitude pruning of shapes-unet stays" in svg  # text, and no outlines of letters
    assert "dc:date" not in svg


def test_a_figure_that_a_palette_would_spoil_keeps_its_colours(tmp_path):
    figure = Figure(figsize=(1, 1))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(np.random.RandomState(0).randint(0, 256, (200, 200, 3), np.uint8))
    drawing.save_png(figure, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.mode == "RGB"


# ---- the commands

@pytest.fixture
def results(tmp_path):
    """Write the records of two methods on two datasets."""
    for dataset in ("shapes", "coco"):
        for method in ("magnitude", "structured"):
            record = keep_metrics(make_record(method, rates=(0.1, 0.2), dataset=dataset), "clip_score")
            write_record(record, record_path(tmp_path, record.model, dataset, method))
    return tmp_path


@pytest.fixture
def texts_only(monkeypatch):
    """Make only the texts of records, for tests of which records are drawn: figures take long."""
    texts = {name: write for name, write in report.RECORD_FILES.items() if not name.endswith(".png")}
    monkeypatch.setattr(report, "RECORD_FILES", texts)  # deleted entries would come back in another order


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
            record = keep_metrics(make_record(method, model=model, images=images), "clip_score", "lpips_dense")
            record.settings.update(denoiser=f"that of {model}", pipeline=f"the rest of {model}")
            write_record(record, record_path(tmp_path, model, "shapes", method))
    visualize_results.main(["--results_dir", str(tmp_path), "--compare"])
    assert "models_shapes.png" in pictures(tmp_path)
    assert capsys.readouterr().err.count("share no figure") == 0
    (tmp_path / "models_shapes.png").unlink()
    for method in ("magnitude", "structured"):
        write_record(keep_metrics(make_record(method, model="shapes-mmdit", images=8), "clip_score", "lpips_dense"),
                     record_path(tmp_path, "shapes-mmdit", "shapes", method))
    visualize_results.main(["--results_dir", str(tmp_path), "--compare"])
    assert "models_shapes.png" not in pictures(tmp_path)
    assert "samples: 8 and 32" in capsys.readouterr().err


def test_two_settings_of_one_method_stand_in_one_comparison_under_their_own_names(tmp_path, capsys):
    for scope in ("layer", "global"):
        record = keep_metrics(make_record(rates=(0.1, 0.2), scope=scope), "clip_score")
        if scope == "global":
            record.points[0].metrics["clip_score"] = 71.5
        write_record(record, record_path(tmp_path, record.model, record.dataset, record.variant))
    folder = tmp_path / "shapes-unet" / "shapes"
    assert [path.name for path in sorted(folder.iterdir())] == ["magnitude+scope=global.json", "magnitude.json"]
    visualize_results.main(["--results_dir", str(tmp_path), "--compare"])
    text = (folder / "comparison.txt").read_text(encoding="utf-8")
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split()[:1] == ["rate"])
    assert [line.split() for line in lines[head:head + 2]] == [["rate", "magnitude", "magnitude"], ["+scope=global"]]
    assert lines[head + 1].index("+scope=global") > lines[head].index("magnitude") + len("magnitude")
    row = next(line for line in lines if line.split()[:1] == ["0.1"] and "±" in line)
    assert "83.1" in row.split("±")[0]
    assert "71.5" in row
    assert capsys.readouterr().out.count("How far? magnitude+scope=global pruning of shapes-unet") == 1
    records = [read_record(path) for path in folder.glob("*.json")]
    figure = comparisons.draw_frontiers(records, 0.05, "")
    assert {"magnitude", "magnitude\n+scope=global"} <= {text.get_text() for text in figure.findobj(Text)}


def test_methods_selects_by_the_name_of_the_variant(texts_only, tmp_path):
    for scope in ("layer", "global"):
        record = keep_metrics(make_record(rates=(0.1,), scope=scope), "clip_score")
        write_record(record, record_path(tmp_path, record.model, record.dataset, record.variant))
    visualize_results.main(["--results_dir", str(tmp_path), "--methods", "magnitude"])
    assert [path.name for path in tmp_path.rglob("*.txt")] == ["magnitude.txt"]
    visualize_results.main(["--results_dir", str(tmp_path), "--methods", "magnitude+scope=global"])
    assert sorted(path.name for path in tmp_path.rglob("*.txt")) == ["magnitude+scope=global.txt", "magnitude.txt"]


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


def test_records_of_other_samples_and_metrics_are_drawn_if_forced(results):
    for method, metric, images in (("magnitude", "fid", 32), ("structured", "lpips", 8)):
        record = keep_metrics(make_record(method, rates=(0.1, 0.3), images=images), "clip_score", metric)
        write_record(record, record_path(results, "shapes-unet", "shapes", method))
    visualize_results.main(["--results_dir", str(results), "--compare", "--force"])
    text = (results / "shapes-unet/shapes/comparison.txt").read_text(encoding="utf-8")
    assert "WARNING: " in text
    assert "samples: 32 and 8" in text
    assert "0.1  magnitude; structured may be as good" in text  # without pairs, neither is worse


def test_models_without_a_common_metric_of_the_figure_are_not_drawn(tmp_path):
    records = [keep_metrics(make_record(model=model), "fid") for model in ("shapes-unet", "shapes-mmdit")]
    assert report.write_models(records, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_missing_figure_of_images_is_named(results, monkeypatch, capsys):
    for name in ("accuracy", "metrics", "cost"):  # which take long
        monkeypatch.setattr(plots, f"draw_{name}", lambda record, path, *_: path)
    record = read_record(record_path(results, "shapes-unet", "coco", "magnitude"))
    save_images(results / "shapes-unet" / "coco", record, range(2), (0.0, 0.1, 0.2))
    visualize_results.main(["--results_dir", str(results), "--methods", "magnitude"])
    assert "shapes-unet/coco/magnitude_images.png" in pictures(results)
    error = capsys.readouterr().err
    assert error.count("magnitude_images.png is not drawn") == 1
    assert f"{results}/shapes-unet/shapes/images holds no image of magnitude" in error


def test_every_command_ends_with_how_far(texts_only, results, capsys):
    visualize_results.main(["--results_dir", str(results), "--tolerance", "0.1"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("How far? structured pruning of shapes-unet stays within 10 % of dense")


@pytest.mark.parametrize(("arguments", "words"), [
    (["--methods", "structred"], r"did you mean 'structured'\? \(one of: magnitude, structured\)"),
    (["--methods", "iterative"], r"unknown variant 'iterative' \(one of: magnitude, structured\)"),
    (["--methods", "magnitude+scope=global"], r"unknown variant .* \(one of: magnitude, structured\)"),
    (["--methods", "magnitude", "--compare"], "two variants"),
    (["--results_file", "none.json"], "cannot read none.json"),
    (["--results_dir", "none"], "no folder none"),
])
def test_bad_input_is_one_line_and_draws_nothing(results, arguments, words):
    with pytest.raises(UserError, match=words) as raised:
        visualize_results.main(["--results_dir", str(results), *arguments])
    assert "\n" not in str(raised.value)
    assert pictures(results) == []


def test_no_record_at_all_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no record to draw"):
        visualize_results.main(["--results_dir", str(tmp_path)])
    with pytest.raises(UserError, match="no record in .* has shards"):
        merge_results.main(["--results_dir", str(tmp_path)])


def test_two_records_of_the_same_rate_are_refused(results):
    first = record_path(results, "shapes-unet", "coco", "magnitude")
    other = read_record(first)
    other.points[0].seconds["generate"] = 7.5  # measured again
    write_record(other, first.parent / "copy.json")
    with pytest.raises(UserError, match="both hold rate 0.1 of magnitude"):
        visualize_results.main(["--results_dir", str(results)])


def write_shards(record, folder):
    """Write a record of the rates 0.1, 0.2 and 0.3 as two shards."""
    for shard, rates in (((1, 2), (0.1, 0.3)), ((2, 2), (0.2,))):
        points = [point for point in record.points if point.rate in rates]
        path = record_path(folder, record.model, record.dataset, record.variant, shard)
        write_record(dataclasses.replace(record, points=points, notes=dataclasses.replace(
            record.notes, rates=[0.1, 0.2, 0.3])), path)


def test_shards_of_a_sweep_are_drawn_and_merged_as_one_record_for_each_variant(
        texts_only, tmp_path, capsys):
    records = [keep_metrics(make_record(rates=(0.1, 0.2, 0.3), scope=scope), "clip_score")
               for scope in ("layer", "global")]
    for record in records:
        write_shards(record, tmp_path)
    visualize_results.main(["--results_dir", str(tmp_path)])
    assert capsys.readouterr().out.count("rate 0.2, which has 96.6 % of dense") == 2
    merge_results.main(["--results_dir", str(tmp_path)])
    for record in records:
        path = record_path(tmp_path, record.model, record.dataset, record.variant)
        assert read_record(path) == read_record(written_alone(record, tmp_path / "alone"))
        assert path.with_suffix(".txt").exists()
    assert sorted(path.name for path in path.parent.glob("*.json")) == ["magnitude+scope=global.json", "magnitude.json"]
    assert capsys.readouterr().out.count("How far?") == 2


def written_alone(record, folder):
    notes = dataclasses.replace(record.notes, rates=[point.rate for point in record.points])
    write_record(dataclasses.replace(record, notes=notes), folder / "r.json")
    return folder / "r.json"


def test_shards_that_lack_rates_are_merged_only_on_demand_and_stay(texts_only, tmp_path, capsys):
    record = keep_metrics(make_record(rates=(0.1, 0.2, 0.3)), "clip_score")
    write_shards(record, tmp_path)
    path = record_path(tmp_path, record.model, record.dataset, record.variant)
    other = path.with_name("magnitude.2of2.json")
    content = other.read_bytes()
    other.unlink()
    with pytest.raises(UserError, match=r"lack the rates 0\.2; measure these, or give --partial"):
        merge_results.main(["--results_dir", str(tmp_path)])
    assert [each.name for each in path.parent.iterdir()] == ["magnitude.1of2.json"]
    merge_results.main(["--results_dir", str(tmp_path), "--partial"])
    assert [point.rate for point in read_record(path).points] == [0.1, 0.3]
    assert path.with_name("magnitude.1of2.json").exists()
    other.write_bytes(content)  # the missing shard comes later: what two files hold alike counts once
    merge_results.main(["--results_dir", str(tmp_path)])
    assert [point.rate for point in read_record(path).points] == [0.1, 0.2, 0.3]
    assert sorted(each.name for each in path.parent.glob("*.json")) == ["magnitude.json"]


def test_a_lone_shard_is_merged(texts_only, tmp_path):
    record = keep_metrics(make_record(rates=(0.1, 0.2, 0.3)), "clip_score")
    path = record_path(tmp_path, record.model, record.dataset, record.variant, (1, 1))
    write_record(record, path)
    merge_results.main(["--results_dir", str(tmp_path)])
    assert [each.name for each in path.parent.glob("*.json")] == ["magnitude.json"]


def test_shards_that_were_measured_differently_are_not_merged(tmp_path):
    for part, images in (((1, 2), 32), ((2, 2), 16)):
        record = make_record(rates=(0.1 * part[0],), images=images)
        write_record(record, record_path(tmp_path, record.model, record.dataset, record.method, part))
    with pytest.raises(UserError, match="samples: 32 and 16"):
        merge_results.main(["--results_dir", str(tmp_path)])
    assert len(list(tmp_path.rglob("*.json"))) == 2
