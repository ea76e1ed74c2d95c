"""What methods calibrate on: captions that are never measured, calls, moments of layer inputs, and what is kept."""
from __future__ import annotations

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_data import coco_folder, coco_json, flickr8k_folder
from test_reconstruct import Idle, Net, Twice, calibration, samples, zeros_of
from torch import nn

from pruning import UserError, cli, data, experiment, methods
from pruning.methods import METHODS, moments, prune
from pruning.methods.calibration import GIB, Calibration, keep_once, match


class One(nn.Module):
    """A single layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, sample):
        return (self.layer(sample),)


def counted(model):
    """The list that grows by one with each call of the model."""
    made = []
    model.register_forward_hook(lambda *given: made.append(1))
    return made


def same(one, other, names):
    return all(torch.equal(a, b) for name in names for a, b in zip(one.of(name, "cpu"), other.of(name, "cpu")))


# ---- captions

def arguments(*flags):
    parser = cli.Parser("")
    cli.add_measuring_flags(parser)
    return parser.parse_args([str(flag) for flag in flags])


def drawn(dataset, folder, measured, wanted, seed, method="wanda"):
    """The captions that are measured, and those that the method calibrates on."""
    where = ["--data_dir", folder] if folder else []
    args = arguments("--method", method, "--dataset", dataset, "--calibration_images", wanted, "--seed", seed, *where)
    known, _ = data.load_samples(args.dataset, measured, args.seed, args.data_dir)
    return [sample.caption for sample in known], experiment.training_captions(args, known)


@pytest.mark.parametrize("seed", [0, 1, 12])
@pytest.mark.parametrize(("measured", "wanted"), [(1, 1), (32, 32), (500, 8), (512, 200)])
def test_no_caption_of_the_shapes_is_measured_and_calibrated_on(seed, measured, wanted):
    known, captions = drawn("shapes", None, measured, wanted, seed)
    assert len(captions) == wanted
    assert not set(captions) & set(known)


@pytest.mark.parametrize("seed", [0, 1, 12])
def test_no_caption_of_coco_or_flickr8k_is_measured_and_calibrated_on_nor_another_of_the_same_image(tmp_path, seed):
    folders = {"coco": (coco_folder(tmp_path / "coco"), 12, "A picture, number {}."),
               "flickr8k": (flickr8k_folder(tmp_path / "flickr8k"), 6, "A dog , number {}0 .")}
    for dataset, (folder, images, text) in folders.items():
        every = {text.format(number + (dataset == "coco")) for number in range(images)}
        for measured in range(1, images):
            for wanted in (1, images - measured):
                known, captions = drawn(dataset, folder, measured, wanted, seed)
                assert len(set(captions)) == wanted
                assert set(captions) <= every - set(known)


def test_two_images_with_the_same_caption_are_not_measured_and_calibrated_on(tmp_path):
    content = coco_json()
    for annotation in content["annotations"][12:24]:
        annotation["caption"] = f"A picture, number {annotation['image_id'] % 4}"
    folder = coco_folder(tmp_path, content)
    for seed in range(4):
        known, captions = drawn("coco", folder, 3, 2, seed)
        assert len(captions) == 2
        assert not set(captions) & set(known)


def test_too_few_captions_are_an_error_that_gives_their_number(tmp_path):
    with pytest.raises(UserError, match="only 4 captions left .* give --calibration_images 4 or measure fewer"):
        drawn("coco", coco_folder(tmp_path), 8, 5, 0)


def test_a_method_that_does_not_calibrate_asks_for_no_captions():
    for method in METHODS:
        args = arguments("--method", method)
        assert bool(experiment.training_captions(args, [])) == bool(methods.needs(method, {}))


def test_the_folder_of_what_is_kept_depends_on_all_that_decides_the_calls_and_on_nothing_else():
    settings = {"seed": 0, "steps": 4, "guidance_scale": 4.0, "image_size": 64, "dtype": "float32",
                "device": "cpu", "pipeline": "a", "configs": "c", "denoiser": "b"}
    versions = {"torch": "2", "diffusers": "1", "transformers": "4"}

    def folder(captions=("one",), batch=8, **changes):
        given = {**settings, "batch_size": batch, "metrics": ["fid"],
                 **{name: each for name, each in changes.items() if name in settings}}
        known = {**versions, "scipy": "1", **{name: each for name, each in changes.items() if name not in settings}}
        return experiment.calibration_folder(SimpleNamespace(settings=given, versions=known), list(captions))

    names = [*settings, *versions]
    others = [folder(**{name: "another"}) for name in names]
    assert len({folder(), folder(("two",)), folder(batch=7), *others}) == 3 + len(names)
    assert folder(scipy="2", metrics=[]) == folder() == folder(batch=16)


# ---- calls

def test_no_calls_and_calls_that_are_not_finite_are_an_error_that_says_what_to_do():
    with pytest.raises(UserError, match="no calls .* --calibration_images 1 or more"):
        _ = Calibration(list, 0).calls
    for bad in (float("nan"), float("inf")):
        calls = [({}, torch.ones(3)), ({}, torch.tensor([1.0, bad, 0.0]))]
        with pytest.raises(UserError, match="NaN or infinity on the calibration captions; use --dtype float32"):
            _ = Calibration(lambda calls=calls: calls, 0).calls


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "reconstruct"])
def test_calls_that_are_not_finite_prune_nothing(method):
    model = Net()
    calls = [(given, output * float("nan")) for given, output in calibration(model).calls]
    with pytest.raises(UserError, match="NaN or infinity"):
        prune(method, model, 0.5, calibration=Calibration(lambda: calls, 0))
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), Net().parameters()))


def test_a_call_is_guided_if_it_has_two_rows_for_each_image():
    calls = [({}, torch.ones(6, 2))]
    for first, guidance in ((3, 4.5), (6, None)):
        assert Calibration(lambda: calls, 0, guidance_scale=4.5, first_batch=first).guidance == guidance


def test_equal_tensors_are_kept_once_whatever_they_are_in():
    keep, x = keep_once(), torch.arange(6.0).view(2, 3)
    first, second = keep({"a": x, "more": [x.clone(), (x + 0, "text")]}), keep(x.T.contiguous().T)
    assert first["a"] is first["more"][0] is first["more"][1][0] is second
    assert torch.equal(second, x)
    others = [keep(x.view(3, 2)), keep(x.to(torch.float64)), keep(x.view(torch.int32)), keep(x + 1)]
    assert len({id(each) for each in (second, *others)}) == 5
    assert [each.dtype for each in others] == [torch.float32, torch.float64, torch.int32, torch.float32]


def test_a_number_that_was_expanded_to_one_row_is_kept():
    keep, expanded = keep_once(), torch.tensor(3.0).expand(1)  # the time of a call for one image, in some pipelines
    assert expanded.stride() == (0,)
    assert torch.equal(keep(expanded), torch.tensor([3.0]))
    assert keep(torch.tensor([3.0])) is keep(expanded)


def test_half_precision_tensors_are_kept_bit_for_bit_and_matched_to_a_denoiser():
    keep, x = keep_once(), torch.randn(3, 5).bfloat16()
    assert keep(x) is keep(x.clone())
    assert torch.equal(keep(x), x)
    given = match({"x": x, "n": torch.arange(3), "rest": ["text", None]}, torch.zeros(1, dtype=torch.float16))
    assert (given["x"].dtype, given["n"].dtype, given["rest"]) == (torch.float16, torch.int64, ["text", None])


# ---- moments

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (5, 7, 6)),
    "a kernel": (lambda: nn.Conv2d(6, 8, 3, padding=1), (2, 6, 9, 7)),
    "a point": (lambda: nn.Conv2d(6, 8, 1), (2, 6, 5, 5)),
    "a stride and groups": (lambda: nn.Conv2d(6, 9, 3, stride=2, padding=1, groups=3), (2, 6, 9, 7)),
    "depthwise, dilated": (lambda: nn.Conv2d(4, 4, (3, 1), padding="same", dilation=2, groups=4), (2, 4, 9, 7)),
    "unequal sides": (lambda: nn.Conv2d(4, 6, (2, 3), stride=(1, 2), padding=(1, 0)), (2, 4, 8, 9)),
    "a circle": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 6, 6)),
}


def inputs_of(layer, x):
    """All inputs of a layer's weight, (groups, n, d): what the layer gives if its weight is the identity."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2)[None]
    d, other = layer.weight[0].numel(), copy.deepcopy(layer)
    other.weight = nn.Parameter(torch.eye(d).repeat(layer.groups, 1).view(-1, *layer.weight.shape[1:]))
    other.bias = None
    with torch.no_grad():
        return other(x).movedim(1, -1).flatten(0, -2).view(-1, layer.groups, d).transpose(0, 1)


@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_moments_are_the_mean_of_outer_products_and_squares_of_inputs(make, shape):
    torch.manual_seed(0)
    model = One(make())
    known = calibration(model, 3, shape)
    x = torch.cat([inputs_of(model.layer, given["sample"]) for given, _ in known.calls], 1)
    gathered = moments.gather(model, known)
    matrix, mean = gathered.of("layer.weight", "cpu")
    assert torch.allclose(matrix, x.transpose(1, 2) @ x / x.shape[1], atol=1e-4)
    assert torch.allclose(mean, x.mean(1), atol=1e-5)
    assert torch.equal(gathered.diagonal("layer.weight", "cpu"), matrix.diagonal(dim1=1, dim2=2))


def test_moments_of_a_layer_that_is_called_twice_are_those_of_both_calls():
    model = Twice()
    known = calibration(model, 3, (5, 12))
    x = torch.cat([given["sample"] for given, _ in known.calls])
    with torch.no_grad():
        x = torch.cat([x, model.both(x).relu()])
    assert torch.allclose(moments.gather(model, known).of("both.weight", "cpu")[0][0], x.T @ x / len(x), atol=1e-4)


def test_only_some_places_of_a_large_call_are_taken_and_the_seed_decides_which():
    model = One(nn.Linear(6, 4))
    calls, layers = calibration(model, 2, (3 * moments.ROWS, 6)).calls, moments.prunable_layers(model)
    given = {index: each for index, (each, _) in enumerate(calls)}
    sums = [moments.input_sums(model, given, [1.0, 1.0], layers, seed)["layer.weight"] for seed in (0, 0, 1)]
    assert [float(count) for _, _, count in sums] == 3 * [2 * moments.ROWS]
    assert torch.equal(sums[0][0], sums[1][0])
    assert not torch.equal(sums[0][0], sums[2][0])


def test_a_small_memory_takes_more_passes_and_gives_the_same_moments(tmp_path):
    model = Net()
    layers = moments.prunable_layers(model)
    largest = max(moments.moment_bytes(layer) for layer in layers.values())
    made, found = counted(model), []
    for number, memory in enumerate((10 ** 9, largest)):
        known = calibration(model, 4, memory=memory, folder=tmp_path / str(number))
        del made[:]
        found.append(moments.gather(model, known))
        passes = len(moments.memory_groups({n: moments.moment_bytes(each) for n, each in layers.items()}, memory))
        assert len(made) == 4 * passes
    assert passes > 2
    assert same(*found, layers)


def test_groups_fit_the_memory_and_hold_every_layer_in_order():
    sizes = {"a": 3, "b": 4, "c": 5, "d": 5, "e": 1}
    assert moments.memory_groups(sizes, 10) == [["a", "b"], ["c", "d"], ["e"]]
    assert moments.memory_groups(sizes, 5) == [["a"], ["b"], ["c"], ["d"], ["e"]]
    assert moments.memory_groups(sizes, 18) == [["a", "b", "c", "d", "e"]]


def test_a_memory_below_the_largest_layer_is_an_error_that_names_the_flag_and_a_value_that_suffices():
    model = One(nn.Linear(1500, 2))
    calls = [({"sample": torch.ones(1, 1500)}, torch.ones(1, 2))]
    with pytest.raises(UserError, match="layer.weight take more than --calibration_memory 0.007812; give") as raised:
        moments.gather(model, Calibration(lambda: calls, 0, memory=GIB // 128))
    enough = re.search(r"give --calibration_memory (\S+) or more \(GiB\)", str(raised.value)).group(1)
    args = arguments("--calibration_memory", enough)
    moments.gather(model, Calibration(lambda: calls, 0, memory=int(args.calibration_memory * GIB)))


def test_moments_in_the_folder_are_used_again_without_a_call(tmp_path):
    model = Net()
    made = counted(model)
    first = moments.gather(model, calibration(model, folder=tmp_path))
    del made[:]
    again = moments.gather(model, Calibration(lambda: pytest.fail("recorded"), 0, folder=tmp_path))
    assert made == []
    assert same(first, again, moments.prunable_layers(model))


def test_only_moments_that_are_missing_are_gathered_and_other_step_weights_have_their_own(tmp_path):
    model = Net()
    known = calibration(model, folder=tmp_path)
    first = moments.gather(model, known)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(before) == 5
    lost = tmp_path / "moments-uniform" / "first.weight.safetensors"
    content = load_file(lost)
    lost.unlink()
    assert same(first, moments.gather(model, known), ["enter.weight", "first.weight"])
    assert all(torch.equal(each, content[name]) for name, each in load_file(lost).items())
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path != lost)
    moments.gather(model, known, "early")
    assert len(list((tmp_path / "moments-early").iterdir())) == 5


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(path.read_bytes()[:-40]),
                                   lambda path: path.write_text("no tensors"), lambda path: path.write_bytes(b"")])
def test_a_broken_file_of_moments_is_an_error_that_names_it(tmp_path, spoil):
    model = Net()
    moments.gather(model, calibration(model, folder=tmp_path))
    broken = tmp_path / "moments-uniform" / "leave.weight.safetensors"
    spoil(broken)
    for method in ("wanda", "sparsegpt"):
        with pytest.raises(UserError, match="leave.weight.safetensors, which held moments: delete that folder"):
            prune(method, Net(), 0.5, calibration=calibration(model, folder=tmp_path))


def test_shares_of_the_calls_add_up_to_all():
    """As several processes share them out."""
    model = Net()
    layers, weights = moments.prunable_layers(model), [1.0, 0.5, 2.0, 1.5]
    given = {index: arguments for index, (arguments, _) in enumerate(calibration(model, 4).calls)}
    whole = moments.input_sums(model, given, weights, layers, 0)
    parts = [moments.input_sums(model, {index: given[index] for index in range(rank, 4, 2)}, weights, layers, 0)
             for rank in range(2)]
    for name in layers:
        for each, first, second in zip(whole[name], *(part[name] for part in parts)):
            assert torch.allclose(each, first + second, rtol=1e-4, atol=1e-4)


def test_an_input_that_is_not_finite_is_an_error_that_names_its_layer():
    class Overflow(Net):
        def forward(self, sample):
            return (super().forward(sample * 1e30 * 1e30)[0].nan_to_num(0, 0, 0),)

    model = Overflow()
    with pytest.raises(UserError, match="the input of enter.weight is not finite during calibration"):
        prune("wanda", model, 0.5, calibration=calibration(model))
    assert not any(mask.any() for mask in zeros_of(model).values())


@pytest.mark.parametrize(("method", "options"), [
    ("reconstruct", {}), ("wanda", {}), ("wanda", {"scope": "global", "refit": True}), ("sparsegpt", {}),
    ("magnitude", {"refit": True, "allocation": "guided"})])
def test_a_layer_that_never_runs_is_no_error(method, options):
    model = Idle()
    pruned = prune(method, model, 0.7, calibration=calibration(model), **options)
    assert pruned.taken == pruned.asked
    assert all(torch.isfinite(each).all() for each in model.parameters())


# ---- step weights

def timed(times):
    """Calls at these times."""
    return [({"timestep": torch.tensor(time), "sample": sample}, torch.zeros(1))
            for time, sample in zip(times, samples(1, len(times), (5, 6)))]


def test_early_weights_fall_from_1_2_to_0_8_and_late_ones_rise_before_their_mean_is_made_1():
    calls = timed([981, 981, 481, 481, 1, 1])
    early, late = (moments.call_weights(calls, name) for name in ("early", "late"))
    assert early[0] / early[-1] == pytest.approx(1.2 / 0.8)
    assert late[-1] / late[0] == pytest.approx(1.2 / 0.8)
    assert early == sorted(early, reverse=True)
    assert late == sorted(late)
    for weights in (early, late, moments.call_weights(calls, "uniform")):
        assert sum(weights) == pytest.approx(len(calls))
        assert weights[::2] == weights[1::2]  # equal times have equal weights
    assert moments.call_weights(calls, "uniform") == [1.0] * 6
    assert moments.call_weights(calls[::-1], "early") == pytest.approx(early[::-1])  # times decide, not the order
    assert moments.call_weights([({}, None)] * 3, "early") == [1.0] * 3  # a denoiser without times


@pytest.mark.parametrize("name", ["early", "late"])
def test_moments_are_weighted_by_the_steps(name):
    class Timed(One):
        def forward(self, sample, timestep):
            return super().forward(sample)

    model, calls = Timed(nn.Linear(6, 4)), timed([900, 500, 100])
    weights = moments.call_weights(calls, name)
    known = Calibration(lambda: calls, 0)
    found, _ = moments.gather(model, known, name).of("layer.weight", "cpu")
    expected = sum(weight * given["sample"].T @ given["sample"] / 15 for weight, (given, _) in zip(weights, calls))
    assert torch.allclose(found[0], expected, atol=1e-4)


# ---- what is kept

def test_what_was_computed_is_kept_in_memory_and_in_the_folder(tmp_path):
    made = []

    def compute():
        made.append(1)
        return {"a": torch.arange(3.0), "b": torch.ones(2, 3).T}

    one, other = (Calibration(list, 0, folder=tmp_path) for _ in range(2))
    first = one.keep("key", compute)
    assert one.keep("key", compute) is first
    found = other.keep("key", compute)
    assert made == [1]
    assert all(torch.equal(found[name], each) for name, each in first.items())
    other.keep("another key", compute)
    assert made == [1, 1]


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(path.read_bytes()[:-3]),
                                   lambda path: path.write_text("{}"), lambda path: path.unlink()])
def test_a_broken_file_is_computed_and_written_again(tmp_path, spoil):
    value = {"a": torch.arange(3.0)}
    Calibration(list, 0, folder=tmp_path).keep("key", lambda: value)
    file, = tmp_path.iterdir()
    spoil(file)
    assert torch.equal(Calibration(list, 0, folder=tmp_path).keep("key", lambda: value)["a"], value["a"])
    assert torch.equal(load_file(file)["a"], value["a"])
    assert list(tmp_path.iterdir()) == [file]


def test_the_dense_denoiser_is_sampled_once_for_each_number_of_captions():
    drawn = []

    def sample(denoiser, count):
        drawn.append((denoiser, count))
        return torch.randn(count, 3, generator=torch.Generator().manual_seed(count))
    known, dense = Calibration(list, 0, sample=sample), object()
    again = [known.dense_latents(dense, count) for count in (4, 12, 4, 12)]
    assert drawn == [(dense, 4), (dense, 12)]
    assert all(torch.equal(found, sample(dense, count).float()) for found, count in zip(again, (4, 12, 4, 12)))


def test_without_a_folder_nothing_is_left_behind():
    known = Calibration(list, 0)
    known.keep("key", lambda: {"a": torch.ones(1)})
    folder = known.folder
    assert len(list(folder.iterdir())) == 1
    del known
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        Calibration(list, 0, folder=tmp_path / "file").keep("key", lambda: {"a": torch.ones(1)})
