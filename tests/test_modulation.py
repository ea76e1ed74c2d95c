"""AdaLN layers of low rank, on tiny random models of the real classes."""
from __future__ import annotations

import copy

import pytest
import torch
from accelerate import init_empty_weights
from test_surgery import BUILD, NEEDS_TORCH_25, assert_equal_outputs, build, call_of, run
from test_units import calibration, error_on

from pruning import UserError
from pruning.methods import modulation, prune, ranks, surgery
from pruning.methods.calibration import answer

MODULATED = [name for name in BUILD if ranks.modulation_layers(BUILD[name]())]
FAMILIES = pytest.mark.parametrize("family", [
    pytest.param(name, marks=NEEDS_TORCH_25) if name.startswith("flux") else name for name in MODULATED])


def pruned(dense, rate, known=None, **options):
    model = copy.deepcopy(dense)
    return model, prune("modulation", model, rate, calibration=known or calibration(dense), **options)


def test_the_families_with_adaln_are_known():
    assert {"sd3", "sd35", "flux_dev", "flux_schnell", "pixart", "sana"} <= set(MODULATED)


@FAMILIES
@pytest.mark.parametrize("rate", [0.3, 0.8])
def test_removed_equals_masked_and_the_rate_is_met(family, rate):
    dense = build(family)
    known = calibration(dense)
    removed, done = pruned(dense, rate, known)
    masked, zeroed = pruned(dense, rate, known, mask_only=True)
    assert done == zeroed
    assert done.taken == done.asked == round(rate * done.total)
    assert_equal_outputs(removed, masked)
    layers = ranks.modulation_layers(dense)
    assert {name: layer.weight.shape for name, layer in ranks.modulation_layers(masked).items()} == {
        name: layer.weight.shape for name, layer in layers.items()}
    low = [module for module in removed.modules() if isinstance(module, ranks.LowRank)]
    assert len(low) == len(layers)
    assert sum(p.numel() for p in removed.parameters()) < sum(p.numel() for p in dense.parameters()) or rate == 0.3


@FAMILIES
def test_inputs_in_few_directions_need_no_more_ranks(family):
    """The inputs of six calls vary in few directions at most, whatever their width is."""
    dense = build(family)
    known = calibration(dense)
    bases = modulation.bases(dense, known)
    calls = sum(len(torch.as_tensor(arguments["timestep"]).flatten()) for arguments, _ in known.calls)
    for basis in bases:
        if calls < len(basis.mean):
            assert basis.lost[calls - 1] < 1e-3
        assert (basis.lost.diff() <= 1e-12).all()
    width = len(bases[0].mean)
    if calls < width - 1:
        model, _ = pruned(dense, 1 - calls / width, known)
        assert error_on(model, known.calls) < 1e-3


def test_the_most_important_directions_stay():
    dense = build("sd3")
    known, errors = calibration(dense), []
    for rate in (0.5, 0.9, 0.97):
        model, _ = pruned(dense, rate, known)
        errors.append(error_on(model, known.calls))
    assert errors == sorted(errors)
    good, _ = pruned(dense, 0.9, known)
    basis, = modulation.bases(dense, known)
    flipped = basis._replace(read=basis.read.flip(0), write=basis.write.flip(1))
    bad = copy.deepcopy(dense)
    modulation.take(bad, flipped, round(0.1 * len(basis.mean)), mask_only=False)
    assert error_on(bad, known.calls) > 2 * error_on(good, known.calls)


@FAMILIES
def test_what_is_read_is_shared_and_a_replay_on_the_meta_device_takes_the_weights(family):
    dense = build(family)
    model, _ = pruned(dense, 0.5)
    with init_empty_weights():
        rebuilt = type(model).from_config(model.config)
    for plan in model.removals:
        surgery.apply(rebuilt, plan)
    rebuilt.load_state_dict(model.state_dict(), strict=True, assign=True)
    assert torch.equal(run(rebuilt.eval()), run(model))
    again = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.mul_(1.5)
    changed = answer(again, call_of(dense))
    rebuilt.load_state_dict(again.state_dict(), strict=True, assign=True)
    assert torch.equal(answer(rebuilt, call_of(dense)), changed)  # copies read their own weights


def test_a_unet_and_a_plan_that_does_not_fit_are_one_line():
    with pytest.raises(UserError, match="ResNets"):
        prune("modulation", build("sd15"), 0.5, calibration=calibration(build("sd15")))
    dense = build("sd3")
    name = next(iter(ranks.modulation_layers(dense)))
    for plan in ({f"{name}.ranks": [0, 2]}, {f"{name}.ranks": []}, {"nowhere.ranks": [0]},
                 {f"{name}.ranks": list(range(1000))}):
        with pytest.raises(UserError):
            surgery.apply(dense, plan)
