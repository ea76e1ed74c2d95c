"""What a user could do instead of pruning: fewer steps, and a cache of the transformer's blocks."""
from __future__ import annotations

import copy
import re
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from families import FAMILIES, NEEDS_TORCH_25, OLD_TORCH, SIZE, SIZES, cogview4, kandinsky5, qwen_image, z_image
from test_analysis import fails

from pruning import UserError, baselines, cli, experiment, methods, pruning_analysis, steps, sweep
from pruning.data import Sample
from pruning.methods import BASELINES, METHODS, cache, prune
from pruning.methods import steps as fewer_steps
from pruning.metrics import costs
from pruning.models import generation, pipelines, skeleton
from pruning.records import report, store
from pruning.records.comparability import comparable, read_records
from pruning.records.record import find_records, read_record
from pruning.records.summaries import summary

CACHES = pytest.mark.skipif(not hasattr(diffusers, "MagCacheConfig"), reason="this diffusers has no MagCache")
EACH = pytest.mark.parametrize("made", ["steps", pytest.param("cache", marks=CACHES)], indirect=True)
STEPS, IMAGES = 4, 2
FLAGS = ["--model", "shapes-mmdit", "--steps", str(STEPS), "--device", "cpu", "--metrics", "lpips_dense"]
FALLING = [1.0, 0.97, 0.99, 0.96, 0.95, 0.93, 0.9, 0.88, 0.85, 0.97]  # as of a drawing in ten steps


@pytest.fixture(scope="module")
def experiments(tmp_path_factory):
    """The experiment of a baseline on the bundled transformer, made once."""
    known = {}

    def make(method):
        if method not in known:
            parser = cli.Parser("")
            cli.add_measuring_flags(parser)
            args = parser.parse_args([*FLAGS, "--method", method])
            args.num_images, args.results_dir = IMAGES, tmp_path_factory.mktemp(method)
            args.calibration_images = 2 if method == "cache" else None
            args.rates = [0.5]
            known[method] = experiment.prepare(args, sweep.own_path(args), None)
        return known[method]
    return make


@pytest.fixture
def made(request, experiments):
    return experiments(request.param)


def drawn(made, rate):
    """The pixels of the images at a rate, and the denoiser that drew them."""
    denoiser, _ = steps.prune_copy(made, rate)
    with steps.drawing(made, rate) as sampling:
        return generation.generate(made.pipeline, made.samples, **sampling).pixels, denoiser


def draw_dense(made, count):
    """The pixels that the dense pipeline draws in some steps."""
    made.pipeline.transformer = copy.deepcopy(made.dense)
    return generation.generate(made.pipeline, made.samples, **{**made.sampling, "steps": count}).pixels


# ---- images

@EACH
def test_rate_0_draws_what_dense_draws(made):
    assert np.array_equal(drawn(made, 0.0)[0], draw_dense(made, STEPS))


def test_steps_at_a_half_draw_what_dense_draws_in_half_the_steps(experiments):
    made = experiments("steps")
    assert np.array_equal(drawn(made, 0.5)[0], draw_dense(made, STEPS // 2))
    assert len(made.pipeline.scheduler.timesteps) == STEPS // 2


@CACHES
@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_the_cache_skips_all_blocks_in_as_many_calls_as_planned(experiments, rate):
    made, ran = experiments("cache"), {}
    denoiser, plan = steps.prune_copy(made, rate)
    for name in (*(f"transformer_blocks.{i}.attn" for i in range(6)), "proj_out"):
        ran[name] = 0

        def count(*_, name=name):
            ran[name] += 1
        denoiser.get_submodule(name).register_forward_hook(count)
    with steps.drawing(made, rate) as sampling:
        generation.generate(made.pipeline, made.samples, **sampling)
    assert plan.taken == round(rate * STEPS) == plan.total - ran["transformer_blocks.0.attn"]
    assert ran.pop("proj_out") == STEPS
    assert set(ran.values()) == {STEPS - plan.taken}


@CACHES
def test_a_denoiser_that_has_drawn_with_the_cache_is_as_it_was(experiments):
    made = experiments("cache")
    images, denoiser = drawn(made, 0.5)
    assert not np.array_equal(images, draw_dense(made, STEPS))
    with torch.no_grad():
        assert torch.equal(denoiser(**made.single_call)[0], made.dense(**made.single_call)[0])
    assert np.array_equal(drawn(made, 0.5)[0], images)  # nothing of the last drawing is left in the cache


@CACHES
def test_calls_that_differ_from_the_plan_are_an_error(experiments):
    made = experiments("cache")
    denoiser, plan = steps.prune_copy(made, 0.5)
    with pytest.raises(UserError, match="skipped 0 of 1 calls of a drawing, and the plan was 2 of 4"), \
            cache.drawing(denoiser, plan, made.sampling), torch.no_grad():
        denoiser(**made.single_call)


@CACHES
def test_the_calls_that_are_timed_skip_all_blocks_or_none(experiments):
    made = experiments("cache")
    denoiser, plan = steps.prune_copy(made, 0.5)
    (whole, short), shares = cache.timed(denoiser, plan)
    assert shares == [0.5, 0.5]
    counts = []
    for each in (whole, short):
        each.transformer_blocks[3].attn.register_forward_hook(lambda *_: counts.append(1))
        with torch.no_grad():
            outputs = [each(**made.single_call)[0] for _ in range(4)]
        assert torch.allclose(outputs[0], outputs[3], atol=1e-5)
        counts.append(None)
    assert counts == [1, 1, 1, 1, None, 1, None]


@CACHES
def test_the_cache_plans_calls_with_and_without_the_caption_alike_if_they_come_one_by_one():
    torch.manual_seed(0)
    pipeline = cogview4(blocks=2)
    pipeline.set_progress_bar_config(disable=True)
    sampling = {"seed": 0, "steps": STEPS, "guidance_scale": 4.0, "image_size": SIZE, "batch_size": 1}

    def draw():
        generation.generate(pipeline, [Sample("a", "a red circle", None)], **sampling)

    draw()  # after a drawing without a cache, diffusers needs to be told that there is one
    plan = cache.plan(0.5, STEPS, cache.magnitudes(pipeline, pipeline.transformer, [draw]))
    assert (plan.total, plan.taken) == (STEPS, 2)
    ran = []
    pipeline.transformer.transformer_blocks[0].attn1.register_forward_hook(lambda *_: ran.append(1))
    with cache.drawing(pipeline.transformer, plan, sampling):
        draw()
    assert len(ran) == 2 * (STEPS - 2)


# ---- plans

@pytest.mark.parametrize(("rate", "taken"), [(0, 0), (0.02, 0), (0.1, 2), (0.52, 10), (0.9, 18), (0.99, 19)])
def test_steps_leave_out_a_share_of_the_steps_but_for_one(rate, taken):
    plan = fewer_steps.plan(rate, 20)
    assert (plan.total, plan.asked, plan.taken) == (20, taken, taken)
    assert plan.drawing == ({"num_inference_steps": 20 - taken} if taken else {})


def test_the_cache_takes_the_lowest_threshold_and_the_fewest_calls_in_a_row_that_skip_as_many():
    for rate in (0.1, 0.3, 0.5, 0.7, 0.8):
        plan = cache.plan(rate, 10, FALLING)
        found = plan.drawing["threshold"], plan.drawing["max_skip_steps"]
        assert plan.taken == plan.asked == round(10 * rate) == cache.skipped(FALLING, *found)
        lower = [each for each in cache.THRESHOLDS if each < found[0]]
        assert all(cache.skipped(FALLING, each, found[1]) != plan.asked for each in lower)
    assert cache.plan(0.5, 10, FALLING).drawing["max_skip_steps"] == cache.IN_A_ROW
    assert cache.plan(0.8, 10, FALLING).drawing["max_skip_steps"] > cache.IN_A_ROW
    assert cache.plan(0.0, 10, FALLING).drawing == {}


def test_the_cache_reaches_no_rate_that_would_skip_one_of_the_first_calls():
    plan = cache.plan(0.9, 10, FALLING)
    assert (plan.asked, plan.taken, plan.drawing) == (9, 0, {})


@pytest.mark.parametrize("method", BASELINES)
def test_a_baseline_prunes_nothing(method):
    with pytest.raises(UserError, match=f"{method} changes how images are drawn, .* give one of magnitude, "):
        prune(method, None, 0.5)


# ---- models that the cache does not take

def test_a_model_without_a_list_of_blocks_or_of_unknown_blocks_is_told(monkeypatch):
    unet, other = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 8), down_block_types=2 * ("DownBlock2D",), up_block_types=2 * ("UpBlock2D",),
        layers_per_block=1, norm_num_groups=2, attention_head_dim=4, cross_attention_dim=4), torch.nn.Module()
    other.transformer_blocks = torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)])
    if hasattr(diffusers, "MagCacheConfig"):
        assert "UNet2DConditionModel has no list of transformer blocks" in cache.why_no_blocks(unet)
        assert "does not know the blocks of Module" in cache.why_no_blocks(other)
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(__version__="0.36.0"))
    assert cache.why_no_blocks(unet) == "diffusers 0.36.0 has no MagCache; a newer release has it"


# Of one block, MagCache caches none of these. What else it says of them shows with two.
OF_TWO_BLOCKS = {f"{make.__name__}_of_two_blocks": partial(make, blocks=2)
                 for make in (z_image, qwen_image, cogview4, kandinsky5)}


@CACHES
@pytest.mark.parametrize(("name", "guided"), [
    pytest.param(name, guided, marks=[] if name.startswith(("z_image", "qwen_image")) else [pytest.mark.slow])
    for name in (*FAMILIES, *OF_TWO_BLOCKS) for guided in (False, True)
    if not (OLD_TORCH and name.startswith(NEEDS_TORCH_25))])
def test_what_check_model_says_of_the_cache_is_so_when_images_are_drawn(name, guided, tmp_path):
    torch.manual_seed(0)
    {**FAMILIES, **OF_TWO_BLOCKS}[name]().save_pretrained(tmp_path, safe_serialization=True)
    pipeline, count = pipelines.load_pipeline(str(tmp_path)), 2 if name == "sana_sprint" else STEPS
    sampling = {"seed": 0, "steps": count, "guidance_scale": 4.0 if guided else 1.0, "batch_size": 2,
                "image_size": SIZES[name.replace("_of_two_blocks", "")]}
    denoiser = getattr(pipeline, pipelines.denoiser_name(pipeline))

    def draw():
        generation.generate(pipeline, [Sample("a", "a red circle", None), Sample("b", "a blue square", None)],
                            **sampling)

    draw()
    why = methods.why_not("cache", skeleton.load(str(tmp_path)), sampling["guidance_scale"])
    if why:
        with pytest.raises(UserError, match=re.escape(f"cache is not possible here: {why}; leave cache out")):
            cache.magnitudes(pipeline, denoiser, [draw])
    else:
        plan = cache.plan(0.5, count, cache.magnitudes(pipeline, denoiser, [draw]))
        assert plan.taken == count // 2
        with cache.drawing(denoiser, plan, sampling):  # an error if other calls are skipped than planned
            draw()


@pytest.mark.parametrize(("flags", "message"), [
    (["--method", "steps", "--save_pruned", "x"], "steps takes no --save_pruned: it leaves all weights as they are"),
    (["--method", "cache", "--compile"], "cache takes no --compile: it decides at each call whether blocks run"),
    (["--baselines", "cache", "--compile"], "cache takes no --compile: it decides at each call whether blocks run"),
    (["--baselines", "cache", "--model", "shapes-unet"], "cache is not possible here: "),
    (["--baselines", "steps", "--sensitivity"], "--sensitivity measures layers, and --baselines images"),
    (["--baselines", "magnitude"], "unknown baseline 'magnitude' (one of: steps, cache)"),
])
def test_what_a_baseline_cannot_do_is_refused_before_anything_is_measured(capsys, tmp_path, flags, message):
    assert message in fails(capsys, pruning_analysis.main, *flags, "--results_dir", tmp_path)
    assert not list(tmp_path.iterdir())


def test_rates_that_leave_out_as_many_steps_are_an_error_or_told(experiments):
    made = experiments("steps")
    with pytest.raises(UserError, match="rate 0.05 leaves out 0 of the 4 steps, as dense does; rate 0.6 leaves out 2 "
                                        "of the 4 steps, as rate 0.5 does; leave out 0.05, 0.6") as raised:
        sweep.reachable(made, [0.05, 0.5, 0.6, 0.7], by_default=False)
    assert "\n" not in str(raised.value)
    assert sweep.reachable(made, [0.05, 0.5, 0.6, 0.7], by_default=True) == [0.5, 0.7]


def test_rates_that_the_cache_does_not_reach_are_an_error_or_told(experiments, monkeypatch):
    made = experiments("steps")
    made = replace(made, record=replace(made.record, method="cache", options={"calibration_images": 8}))
    monkeypatch.setattr(baselines, "magnitudes", lambda _: FALLING)
    with pytest.raises(UserError, match="cache: no setting leaves out exactly 9 of the 10 calls, rate 0.9; leave out"):
        sweep.reachable(made, [0.5, 0.9], by_default=False)
    assert sweep.reachable(made, [0.5, 0.9], by_default=True) == [0.5]


# ---- records

@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """The records by variant of a sweep with all baselines that this diffusers has, and their folder."""
    folder = tmp_path_factory.mktemp("baselines")
    names = ["steps", *(["cache"] if hasattr(diffusers, "MagCacheConfig") else [])]
    with pytest.MonkeyPatch.context() as patch:
        for function in ("write_record_files", "write_report"):  # other tests draw
            patch.setattr(report, function, lambda *_, **__: [])
        patch.setattr(costs, "MOST_ROUNDS", costs.ROUNDS)
        options = METHODS["cache"].options
        patch.setitem(options, "calibration_images", options["calibration_images"]._replace(default=2))
        pruning_analysis.main([*FLAGS, "--num_images", str(IMAGES), "--rates", "0.5", "--baselines", *names,
                               "--results_dir", str(folder)])
    return {path.stem: read_record(path) for path in find_records(folder)}, folder


def test_baselines_are_measured_as_the_method_was_and_share_its_figures(records):
    found, folder = records
    assert {*found, "cache"} == {"magnitude", "steps", "cache"}
    (_, warning), = comparable(read_records(find_records(folder)))
    assert warning == ""
    for name in set(found) & set(BASELINES):
        record = found[name]
        assert record.dense.per_image == found["magnitude"].dense.per_image
        assert record.dense.image_seconds == found["magnitude"].dense.image_seconds  # the dense images are the method's
        assert [point.unit for point in record.points] == [METHODS[name].unit] * len(record.points)
        for point in record.points:
            assert set(point.metrics) == set(record.dense.metrics) == {"lpips_dense"}
            assert (point.parameters, point.macs) == (record.dense.parameters, record.dense.macs)
            assert point.ratio_intervals["denoiser_seconds"][0] > 0


def test_the_dense_images_of_a_baseline_are_those_of_the_method(records):
    found, folder = records
    images = folder / "shapes-mmdit/shapes/images"
    for name in set(found) & set(BASELINES):
        for index in range(IMAGES):
            own, other = (store.image_file(images, each, 0.0, index).read_bytes() for each in (name, "magnitude"))
            assert own == other


def test_a_record_of_steps_says_what_share_of_dense_calls_is_left_and_how_to_draw_so(records):
    record = records[0]["steps"]
    point, = record.points
    assert (point.rate, point.sparsity, point.drawing) == (0.5, 0.5, {"num_inference_steps": STEPS // 2})
    assert point.ratio_intervals["denoiser_seconds"] == [0.5, 0.5]
    assert point.denoiser_seconds == 0.5 * point.dense_denoiser_seconds
    text = " ".join(summary(record).split())
    assert "by pipeline(prompt, …): at rate 0.5 with num_inference_steps=2." in text
    assert "At rate 0.5, the denoiser's calls for an image together take 0.50 times as long as dense" in text
    assert "parameters are zero" not in text


@CACHES
def test_a_record_of_the_cache_holds_what_diffusers_needs_to_draw_so(records):
    record = records[0]["cache"]
    point, = record.points
    assert (point.rate, point.sparsity, point.units_taken, point.units_total) == (0.5, 0.5, 2, STEPS)
    assert len(point.drawing["mag_ratios"]) == diffusers.MagCacheConfig(**point.drawing).num_inference_steps == STEPS
    assert "by diffusers' MagCacheConfig(…): at rate 0.5 with threshold=" in " ".join(summary(record).split())
