"""The denoiser classes of diffusers as tiny random models: units are apart, removed equals masked, all is counted."""
from __future__ import annotations

import copy
from pathlib import Path

import diffusers
import pytest
import torch
import zoo
from accelerate import init_empty_weights
from torch import nn

from benchmarks import families
from pruning import UserError, methods
from pruning.methods import blocks, bypass, moments, ranks, reach, sequential, surgery
from pruning.methods.calibration import Calibration
from pruning.models import portable
from pruning.models.provenance import release

ROOT = Path(__file__).resolve().parents[1]
UNITS = {"structured": ("neurons", "channels"), "attention_heads": ("heads",)}
# One for each sort of rows: fused, grouped and joint heads, probed feed-forwards, experts, neurons beside heads.
QUICK = ("ErnieImageTransformer2DModel", "Flux2Transformer2DModel", "HiDreamImageTransformer2DModel",
         "HunyuanVideoTransformer3DModel", "JoyImageEditTransformer3DModel", "Kandinsky5Transformer3DModel",
         "Lumina2Transformer2DModel", "PRXTransformer2DModel", "UNet2DConditionModel/kandinsky",
         "OmniGenTransformer2DModel", "StableCascadeUNet", "DreamLiteUNetModel")
# Classes whose heads cannot go one by one, because rotary positions differ between heads.
WITHOUT = {
    "structured": set(),
    "attention_heads": {"LTXVideoTransformer3DModel", "MochiTransformer3DModel"}}
EACH = pytest.mark.parametrize("name", [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in zoo.NAMES])
METHODS = pytest.mark.parametrize("method", list(UNITS))


def prune(method, model, rate, **options):
    return methods.prune(method, model, rate, criterion="norm", refit=False, **options)


def in_reach(model, units, asked):
    """How many units all groups together can lose of those asked for, and half of the smallest step of a group."""
    groups, _ = surgery.find_groups(model, units)
    most = sum(group.units if group.kind.empty else group.units - group.norm_groups for group in groups)
    return min(asked, most), min(group.norm_groups for group in groups) / 2


@EACH
@METHODS
def test_removed_equals_masked_or_the_class_is_known_to_have_no_such_units(name, method):
    dense = zoo.build(name)
    expected = zoo.run(name, dense)
    if name in WITHOUT[method]:
        with pytest.raises(UserError, match=f"{method} can remove"):
            prune(method, dense, 0.5)
        return
    for rate in (0.1, 0.5, 0.9):
        removed, masked = copy.deepcopy(dense), copy.deepcopy(dense)
        done = prune(method, removed, rate)
        assert done == prune(method, masked, rate, mask_only=True)
        expected_count, off = in_reach(dense, UNITS[method], done.asked)
        assert abs(done.taken - expected_count) <= (off if off >= 1 else 0)
        one, other = zoo.run(name, removed), zoo.run(name, masked)
        if not done.inexact:
            assert (one - other).abs().max() <= 1e-5 * other.abs().max()
        if done.taken:
            assert removed.num_parameters() < dense.num_parameters()
            assert not torch.allclose(one, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@EACH
@METHODS
def test_a_plan_replayed_on_the_meta_device_takes_the_weights(name, method):
    if name in WITHOUT[method]:
        pytest.skip("no such units")
    pruned = zoo.build(name)
    zoo.run(name, pruned)  # skips the test if torch is too old
    for each in (method, "structured"):
        if name not in WITHOUT[each]:
            prune(each, pruned, 0.4)
    with init_empty_weights():
        rebuilt = type(pruned).from_config(pruned.config)
    for plan in pruned.removals:
        surgery.apply(rebuilt, plan)
    rebuilt.load_state_dict(pruned.state_dict(), strict=True, assign=True)
    assert torch.equal(zoo.run(name, rebuilt.eval()), zoo.run(name, pruned))


@EACH
def test_a_saved_folder_rebuilds_the_class_without_this_project(name):
    pruned = zoo.build(name)
    expected = zoo.run(name, pruned)
    for method in UNITS:
        if name not in WITHOUT[method]:
            prune(method, pruned, 0.4)
    if not hasattr(diffusers, type(pruned).__name__):
        pytest.skip("diffusers does not export the class")
    space = {}
    exec(portable.source_of(pruned), space)
    config = {key: value for key, value in pruned.config.items() if not key.startswith("_")}
    rebuilt = space[f"Pruned{type(pruned).__name__}"](**config, pruned=portable.differences(pruned)).eval()
    rebuilt.load_state_dict(pruned.state_dict(), strict=True)
    with torch.no_grad():
        output = zoo.tensor_of(rebuilt(**zoo.call_of(name)))
    assert torch.equal(output, zoo.run(name, pruned))
    assert not torch.equal(output, expected)


@pytest.mark.parametrize("name", [each for each in ("Lumina2Transformer2DModel", "Flux2Transformer2DModel")
                                  if each in zoo.NAMES])
def test_blocks_of_probed_feed_forwards_are_zeroed_as_they_are_bypassed(name):
    dense = zoo.build(name)
    zoo.run(name, dense)  # skips the test if torch is too old
    found = bypass.find(dense, zoo.call_of(name))
    gone = dict(list(found.items())[-1:])
    removed, masked = copy.deepcopy(dense), copy.deepcopy(dense)
    bypass.take_out(removed, gone)
    blocks.zero(masked, gone, zoo.call_of(name))
    one, other = zoo.run(name, removed), zoo.run(name, masked)
    assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def inputs_of(name, model, layers):
    """The inputs of layers when they are first called: name of the weight -> tensor."""
    seen = {}

    def watch(own):
        return lambda _layer, inputs: seen.setdefault(own, inputs[0].clone()) is None or None

    hooks = [layer.register_forward_pre_hook(watch(own)) for own, layer in layers.items()]
    zoo.run(name, model)
    for hook in hooks:
        hook.remove()
    return seen


def normed(group):
    """Whether a norm lets each unit act on the others."""
    return group.norms_across() or group.kind.vectors or group.kind.unit == "channels"


@EACH
def test_a_unit_decides_its_own_inputs_of_the_layers_behind_and_no_other(name):
    """The probe: what a unit owns of the rows gets other values, and what changes behind them is looked at."""
    model = zoo.build(name)
    groups, _ = surgery.find_groups(model, ("heads", "neurons", "channels"))
    one_of_each = {(type(group.module), group.kind.unit, tuple(p.path for p in group.parts())): group
                   for group in groups if not normed(group)}
    assert one_of_each or all(map(normed, groups))
    for group in one_of_each.values():
        unit, columns = group.units // 2, group.columns()
        dense = inputs_of(name, model, group.column_layers())
        kept = {part.layer: part.layer.weight.detach().clone() for part in group.parts(scored=True) if part.dim == 0}
        with torch.no_grad():
            for part in group.parts(scored=True):
                if part.dim == 0:
                    group.by_unit(part.layer.weight, part).select(1, unit).normal_()
        changed = inputs_of(name, model, group.column_layers())
        for layer, weight in kept.items():
            layer.weight.data.copy_(weight)
        for own, part in columns.items():
            channels = 1 if isinstance(part.layer, nn.Conv2d) else -1
            difference = (changed[own] - dense[own]).movedim(channels, -1).flatten(0, -2).abs().amax(0)
            width = part.count // group.units
            mine = slice(part.first + unit * width, part.first + (unit + 1) * width)
            others = torch.ones(len(difference), dtype=torch.bool)
            others[mine] = False
            assert difference[mine].max() > 1e-4
            assert difference[others].max() <= 1e-5


@EACH
@METHODS
def test_no_parameter_is_left_out_in_silence(name, method):
    """Counted anew, by shapes: a parameter has lost its share of what is said to be reached, and all else is named."""
    model = zoo.build(name)
    if name in WITHOUT[method]:
        pytest.skip("no such units")
    done = prune(method, model, 0.0)
    sizes = {own: parameter.numel() for own, parameter in model.named_parameters()}
    groups = surgery.find_groups(model, UNITS[method])[0]
    surgery.apply(model, {group.name: list(range(0, group.units, group.units // group.norm_groups))
                          for group in groups})
    after = {own: parameter.numel() for own, parameter in model.named_parameters()}
    for own, size in sizes.items():
        reached, lost = done.reached.get(own, 0), size - after[own]
        assert lost == 0 if reached == 0 else any(
            lost * group.units == reached * (group.units - group.norm_groups) for group in groups)
        left, why = done.unreached.get(own, (0, ""))
        assert (reached + left, bool(why)) == (size, left > 0)


@pytest.mark.slow
def test_at_least_forty_classes_have_heads_and_neurons_or_channels():
    if release("diffusers") < (0, 42):
        pytest.skip("an older diffusers has fewer classes")
    both = {name.split("/")[0] for name in zoo.NAMES if not any(name in without for without in WITHOUT.values())}
    assert len(both) >= 40


def calibration(name, model, count=4):
    """Recorded calls of the model."""
    calls = [(call, zoo.run(name, model, seed)) for seed in range(10, 10 + count) for call in [zoo.call_of(name, seed)]]
    return Calibration(lambda: calls, seed=0)


@pytest.mark.parametrize("name", [pytest.param(each, marks=[] if each == "Lumina2Transformer2DModel" else
                                               pytest.mark.slow) for each in QUICK if each in zoo.NAMES])
@METHODS
def test_removed_equals_masked_after_the_refit_too(name, method):
    dense = zoo.build(name)
    known = calibration(name, dense)
    removed, masked = copy.deepcopy(dense), copy.deepcopy(dense)
    done = methods.prune(method, removed, 0.5, calibration=known)
    assert done == methods.prune(method, masked, 0.5, calibration=known, mask_only=True)
    one, other = zoo.run(name, removed), zoo.run(name, masked)
    assert done.inexact or (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_experts_do_not_learn_from_the_tokens_that_other_experts_get_after_pruning():
    model = zoo.build("HiDreamImageTransformer2DModel")
    known, layers = calibration("HiDreamImageTransformer2DModel", model), moments.prunable_layers(model)
    aims, learnt = sequential.dense_outputs(model, layers, known), {}
    sequential.in_order(model, layers, aims, lambda name, layer, x, y, gate: learnt.update({name: (x, y)}), known)
    experts = {name for name in learnt if ".experts." in name}
    assert experts
    assert all((x.shape[1], y.shape[1], x.any(), y.any()) == (1, 1, False, False)
               for x, y in map(learnt.get, experts))
    assert all(x.any() and y.any() for x, y in map(learnt.get, set(learnt) - experts))


def in_parts(value):
    """All tensors in a value, tuples as deep as they go."""
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in in_parts(item)]
    return [value] if isinstance(value, torch.Tensor) else []


@pytest.mark.parametrize("name", [pytest.param(each, marks=[] if each in (
    "SD3Transformer2DModel", "FluxTransformer2DModel", "HunyuanImageTransformer2DModel") else pytest.mark.slow)
    for each in zoo.NAMES])
def test_streams_and_gates_of_the_refit_are_those_of_the_blocks(name):
    """Stream + gate · output is what a later module is called with or a block returns, or begins or ends with."""
    model = zoo.build(name)
    layers = {f"{path}.weight": layer for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    streams = {path: block for path, (block, row) in sequential.streams_of(model, layers).items() if row.gate}
    if not streams:
        pytest.skip("no gated streams are known")
    sums, seen, before = {}, [], {}

    def note(path, layer, x, stream, gate):
        if path in streams:
            before[path] = (stream.clone(), gate.clone())

    def note_output(path):
        return lambda layer, inputs, output: sums.update({path: before[path][0] + before[path][1] * output})

    def note_all(module, inputs, kwargs, output):
        seen.extend(in_parts((inputs, tuple(kwargs.values()), output)))

    hooks = [module.register_forward_hook(note_all, with_kwargs=True) for module in model.modules()]
    hooks += [layers[path].register_forward_hook(note_output(path)) for path in streams]
    with moments.hooked(hooks), sequential._watched(model, layers, True, note):
        zoo.run(name, model)

    def found(value, whole):
        if value.dim() != whole.dim() or value.shape[-1] != whole.shape[-1] or value.shape[1] > whole.shape[1]:
            return False
        ends = whole[:, :value.shape[1]], whole[:, -value.shape[1]:]
        return any(end.shape == value.shape and torch.allclose(end, value, atol=1e-5) for end in ends)

    assert set(sums) == set(streams)
    # A second attention adds to the stream before another module sees it.
    twice = {path for path in streams if getattr(streams[path], "attn2", None) and "attn.to_out" in path}
    assert all(any(found(value, whole) for value in seen) for path, whole in sums.items() if path not in twice)


@pytest.mark.parametrize("name", [pytest.param(each, marks=[] if each in ("QwenImageTransformer2DModel",
                                                                    "Flux2Transformer2DModel") else
                                               pytest.mark.slow) for each in zoo.NAMES])
def test_adaln_layers_get_a_low_rank_and_are_no_feed_forwards_then(name):
    dense = zoo.build(name)
    if not ranks.modulation_layers(dense) or name == "UVit2DModel":  # which denoises no latents
        pytest.skip("no AdaLN layers")
    known = calibration(name, dense)
    removed, masked = copy.deepcopy(dense), copy.deepcopy(dense)
    done = methods.prune("modulation", removed, 0.8, calibration=known)
    assert done == methods.prune("modulation", masked, 0.8, calibration=known, mask_only=True)
    one, other = zoo.run(name, removed), zoo.run(name, masked)
    assert (one - other).abs().max() <= 1e-5 * other.abs().max()
    assert not torch.equal(one, zoo.run(name, dense))
    before, after = (surgery.find_groups(model, ("neurons",))[0] for model in (dense, removed))
    assert [group.name for group in after] == [group.name for group in before]


@pytest.mark.slow
@pytest.mark.parametrize("model", families.PUBLISHED)
def test_units_and_ranks_hold_most_of_a_published_model(model):
    denoiser = families.build(model)
    if denoiser is None:
        pytest.skip(f"diffusers has no {families.PUBLISHED[model][0]}")
    reached, left = reach.by_units(denoiser)
    total = denoiser.num_parameters()
    assert sum(reached.values()) + sum(each.parameters for each in left.values()) == total
    assert sum(reached.values()) >= 0.85 * total


@pytest.mark.slow
def test_the_table_of_shares_is_what_the_configs_give():
    missing = [name for name, (kind, _) in families.PUBLISHED.items() if not hasattr(diffusers, kind)]
    if missing:
        pytest.skip(f"this diffusers lacks {', '.join(missing)}")
    assert families.table() in (ROOT / "docs/methods.md").read_text(encoding="utf-8")


# ---- a family that nobody knows

class Plain(nn.Module):
    """A feed-forward with names of its own."""

    def __init__(self, width=12, hidden=20):
        super().__init__()
        self.there, self.back = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.back(self.there(x).relu())


class Glu(Plain):
    """A gate and a value in two layers, of which the last is written first."""

    def __init__(self, width=12, hidden=20):
        super().__init__(width, hidden)
        self.gate = nn.Linear(width, hidden)

    def forward(self, x):
        return self.back(self.there(x) * self.gate(x).sigmoid())


class FusedGlu(Plain):
    """A gate and a value in one layer, one after the other."""

    def __init__(self, width=12, hidden=20):
        super().__init__(width, hidden)
        self.there = nn.Linear(width, 2 * hidden)

    def forward(self, x):
        value, gate = self.there(x).chunk(2, -1)
        return self.back(value * nn.functional.silu(gate))


class Pointwise(Plain):
    """A feed-forward of convolutions, for a picture of tokens."""

    def __init__(self, width=12, hidden=20):
        super().__init__()
        self.there, self.back = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)

    def forward(self, x):
        return super().forward(x.transpose(1, 2)[..., None])[..., 0].transpose(1, 2) if x.dim() == 3 else \
            super().forward(x)


class InterleavedGlu(FusedGlu):
    """A gate and a value in one layer, in turns."""

    def forward(self, x):
        pairs = self.there(x).unflatten(-1, (-1, 2))
        return self.back(pairs[..., 0] * pairs[..., 1])


class Normed(Plain):
    """Neurons that a norm scales together."""

    def forward(self, x):
        return self.back(nn.functional.normalize(self.there(x).relu(), dim=-1))


class Shifted(Plain):
    """Neurons that are not zero when their rows are."""

    def forward(self, x):
        return self.back(self.there(x).cos())


class Peeking(Plain):
    """Neurons that something else reads too."""

    def forward(self, x):
        hidden = self.there(x).relu()
        return self.back(hidden) + hidden.mean()


class Alarmed(Plain):
    """Neurons that double all others when one of them is large."""

    def __init__(self):
        super().__init__()
        self.there.weight.data.mul_(0.1)

    def forward(self, x):
        hidden = self.there(x)
        return self.back(hidden * (1 + (hidden > 1.2).any(-1, keepdim=True)))


class OddAttention(nn.Module):
    """An attention with names of its own."""

    def __init__(self):
        super().__init__()
        self.reads, self.writes = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x):
        q, k, v = self.reads(x).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        return self.writes(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Stranger(nn.Module):
    """A denoiser of which no row of KINDS knows a part."""

    def __init__(self, feed_forward):
        super().__init__()
        self.steps = nn.ModuleList([nn.ModuleList([OddAttention(), feed_forward()]) for _ in range(2)])

    def forward(self, x):
        for mix, change in self.steps:
            x = x + mix(x)
            x = x + change(x)
        return x


@pytest.mark.parametrize("feed_forward", [Plain, Glu, FusedGlu, Pointwise])
def test_feed_forwards_of_an_unknown_family_are_found_by_probing(feed_forward):
    torch.manual_seed(0)
    dense = Stranger(feed_forward).eval()
    x = torch.randn(2, 5, 12)
    for rate in (0.1, 0.5, 0.9):
        removed, masked = copy.deepcopy(dense), copy.deepcopy(dense)
        done = prune("structured", removed, rate)
        assert done == prune("structured", masked, rate, mask_only=True)
        assert (done.total, done.taken) == (40, round(40 * rate))
        assert torch.allclose(removed(x), masked(x), atol=1e-6)
        assert not torch.allclose(removed(x), dense(x), atol=1e-3)
    rebuilt = Stranger(feed_forward).to("meta")
    surgery.apply(rebuilt, removed.removals[0])
    rebuilt.load_state_dict(removed.state_dict(), strict=True, assign=True)
    assert torch.equal(rebuilt.eval()(x), removed(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_probing_works_in_half_precision(dtype):
    assert prune("structured", Stranger(FusedGlu).to(dtype).eval(), 0.5, round_to=1).taken == 20


@pytest.mark.parametrize("feed_forward", [InterleavedGlu, Normed, Shifted, Peeking, Alarmed])
def test_what_the_probe_refuses_is_left_alone_and_counted_with_its_share(feed_forward):
    torch.manual_seed(0)
    model = Stranger(feed_forward).eval()
    with pytest.raises(UserError, match="Stranger has no neurons"):
        prune("structured", model, 0.5)
    model.steps[0][1] = Plain()
    done = prune("structured", model, 0.5)
    assert (done.total, done.taken) == (20, 10)
    refused = {name: left for name, left in done.unreached.items() if name.startswith("steps.1.1")}
    assert sum(left.parameters for left in refused.values()) == sum(p.numel() for p in model.steps[1][1].parameters())


def test_an_attention_of_an_unknown_family_is_named_with_its_share():
    model = Stranger(Plain).eval()
    with pytest.raises(UserError, match=r"steps\.0\.0: its class test_zoo\.OddAttention is not known; steps\.1\.0: .*"
                                        r" \(2 such modules hold 54\.9 % of the parameters\)"):
        prune("attention_heads", model, 0.5)
    assert prune("structured", model, 0.5).unreached["steps.0.0.reads.weight"].parameters == 36 * 12


def test_what_lies_in_no_list_of_modules_is_no_feed_forward():
    """Only what lies in a list of modules is probed, so that embeddings of time and text stay as they are."""
    class Embedded(Stranger):
        def __init__(self):
            super().__init__(Plain)
            self.time = Plain()

    names = {group.name for group in surgery.find_groups(Embedded().eval(), ("neurons",))[0]}
    assert names == {"steps.0.1.neurons", "steps.1.1.neurons"}
