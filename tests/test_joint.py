"""Units of all kinds under one budget, on tiny random models of the real classes."""
from __future__ import annotations

import copy

import pytest
import torch
from test_surgery import FAMILIES, assert_equal_outputs, build, call_of
from test_units import calibration

from pruning import UserError
from pruning.methods import budgets, bypass, joint, losses, moments, prune, ranks, surgery, units
from pruning.methods.calibration import answer
from pruning.metrics import costs


def sampling(dense, change=lambda denoiser: 1.0):
    """A calibration whose final latents are an answer of the denoiser, times what `change` says of it."""
    @torch.no_grad()
    def sample(denoiser, _):
        return answer(denoiser, call_of(dense, seed=99)).cpu() * change(denoiser)  # a calibration serves both devices
    return calibration(dense, sample=sample)


def pruned(dense, rate, known=None, **options):
    model = copy.deepcopy(dense)
    return model, prune("joint", model, rate, calibration=known or sampling(dense), **options)


def cost(model, budget):
    return costs.count_macs(model, call_of(model)) if budget == "macs" else costs.count_parameters(model)["parameters"]


@FAMILIES
@pytest.mark.parametrize("budget", ["macs", "parameters"])
def test_a_budget_is_met_and_never_overspent(family, budget):
    """What one step of the lumpiest group saves may be too much; with real models that is less than a hundredth."""
    dense = build(family)
    groups, _ = surgery.survey(dense, *joint.UNITS)
    total, prices = budgets.prices(dense, groups, call_of(dense), budget)
    assert total == cost(dense, budget)
    step = max(prices[group.name] * losses.step_size(dense, group, 0) for group in groups)
    with_ranks = budget == "parameters" and bool(ranks.modulation_layers(dense))
    limit = joint.largest_rate(dense, call_of(dense), budget=budget, round_to=0)
    for share in (0.3, 0.7):
        rate = share * limit
        model, done = pruned(dense, rate, budget=budget)
        saved = total - cost(model, budget)
        assert saved == pytest.approx(done.taken, abs=1)
        assert any(isinstance(module, ranks.LowRank) for module in model.modules()) <= with_ranks
        assert rate * total - 1 <= saved <= rate * total + max(step, joint.SLACK * total) + 1


@FAMILIES
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_removed_equals_masked(family, share):
    dense = build(family)
    known, rate = sampling(dense), share * joint.largest_rate(dense, call_of(dense), budget="macs", round_to=0)
    removed, done = pruned(dense, rate, known)
    masked, zeroed = pruned(dense, rate, known, mask_only=True)
    assert done == zeroed
    assert_equal_outputs(removed, masked, dense)


def test_blocks_go_where_the_final_latents_hardly_feel_it_and_the_budget_holds():
    """The last attention is next to an identity: without it more is left for the other units."""
    dense = build("sd15")
    with torch.no_grad():
        for parameter in dense.up_blocks[1].attentions[1].proj_out.parameters():
            parameter.mul_(1e-3)
    rate = 0.5 * joint.largest_rate(dense, call_of(dense), budget="macs", round_to=0)
    total = cost(dense, "macs")
    model, done = pruned(dense, rate)
    gone = [name for name, module in model.named_modules() if isinstance(module, bypass.Bypass)]
    assert "up_blocks.1.attentions.1" in gone
    assert total - cost(model, "macs") == pytest.approx(done.taken, abs=1)
    assert done.asked <= done.taken
    assert done.layers["up_blocks.1.attentions.1.transformer_blocks.0.ff.neurons"].rate == 1.0


def test_no_block_goes_if_the_final_latents_come_no_nearer():
    dense = build("sd15")

    def change(denoiser):
        return 1.0 if not any(isinstance(module, bypass.Bypass) for module in denoiser.modules()) else 100.0

    rate = 0.5 * joint.largest_rate(dense, call_of(dense), budget="macs", round_to=0)
    model, _ = pruned(dense, rate, sampling(dense, change))
    assert not any(isinstance(module, bypass.Bypass) for module in model.modules())


def test_measuring_changes_no_weight_and_nothing_but_the_plan_depends_on_it():
    dense = build("sd15")
    before = copy.deepcopy(dense.state_dict())
    groups, _ = surgery.survey(dense, *joint.UNITS)
    known = sampling(dense)
    gathered = moments.gather(dense, known, layers=units.column_layers(groups))
    found = losses.order_of(dense, groups, gathered, known)
    losses.latent_factors(dense, groups, found, gathered, known)
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())


def test_a_group_that_the_final_latents_feel_more_loses_less():
    dense = build("sd15")
    groups, _ = surgery.survey(dense, *joint.UNITS)
    felt = max((group for group in groups if group.kind.unit == "neurons"), key=lambda group: group.units)
    layer = next(iter(felt.column_layers().values()))
    untouched = layer.weight.detach().clone()

    def change(denoiser):
        own = dict(denoiser.named_parameters()).get(felt.path("net.2.weight"))  # none if its block is bypassed
        return 1.0 if own is not None and torch.equal(own, untouched) else 100.0

    rate = 0.5 * joint.largest_rate(dense, call_of(dense), budget="macs", round_to=0)
    _, alike = pruned(dense, rate)
    _, weighed = pruned(dense, rate, sampling(dense, change))
    assert weighed.layers[felt.name].rate < alike.layers[felt.name].rate


def test_the_least_sum_of_errors_is_found():
    """Steps go by what they cost for what they save, dear beginnings included; too large steps are passed over."""
    paths = {name: losses.Path(1, [saved * k for k in range(4)], [], errors) for name, saved, errors in (
        ("cheap", 10.0, [0, 1, 2, 30]), ("late", 10.0, [0, 8, 8, 8]), ("dear", 10.0, [0, 50, 60, 70]),
        ("fine", 1.0, [0, 20, 40, 60]))}
    assert joint.cheapest(paths, 100.0, 0.2) == {"cheap": 2, "late": 0, "dear": 0, "fine": 0}
    assert joint.cheapest(paths, 100.0, 0.5) == {"cheap": 2, "late": 3, "dear": 0, "fine": 0}
    assert joint.cheapest(paths, 100.0, 0.52) == {"cheap": 2, "late": 3, "dear": 0, "fine": 2}
    with pytest.raises(UserError, match=r"0\.930"):
        joint.cheapest(paths, 100.0, 0.95)


@pytest.mark.parametrize("power", joint.POWERS)
def test_an_attention_loses_its_last_head_only_where_nothing_else_is_left(power):
    """Alone the last head hardly costs more than the one before; the neurons cost a thousand times as much."""
    paths = {"heads": losses.Path(1, [0, 10, 20], [0, 0.5, 1.0], [0, 0.001, 0.002]),
             "neurons": losses.Path(1, [0, 10, 20, 30], [0, 0.25, 0.5, 0.75], [0, 1, 2, 3])}
    weighed = joint.weighed(paths, power)
    assert joint.cheapest(weighed, 100.0, 0.4) == {"heads": 1, "neurons": 3}
    assert joint.cheapest(weighed, 100.0, 0.5) == {"heads": 2, "neurons": 3}


def test_a_budget_of_parameters_takes_ranks_where_a_transformer_hardly_needs_them():
    dense = build("sd3")
    model, done = pruned(dense, 0.3, budget="parameters")
    assert any(isinstance(module, ranks.LowRank) for module in model.modules())
    masked, zeroed = pruned(dense, 0.3, budget="parameters", mask_only=True)
    assert done == zeroed
    assert_equal_outputs(model, masked, dense)
    assert not any(isinstance(module, ranks.LowRank) for module in pruned(dense, 0.3)[0].modules())


def test_time_is_a_budget_by_what_each_layer_takes():
    dense = build("sd3")
    model, done = pruned(dense, 0.1, budget="time")
    assert done.unit == "microseconds"
    assert done.asked <= done.taken <= done.total
    assert costs.count_macs(model, call_of(model)) < costs.count_macs(dense, call_of(dense))


def test_what_cannot_be_had_is_one_line_and_nothing_is_pruned():
    dense = build("sd15")
    before = sum(parameter.numel() for parameter in dense.parameters())
    with pytest.raises(UserError, match="without any of these units"):
        prune("joint", dense, 0.99, calibration=sampling(dense))
    with pytest.raises(UserError, match="can \\(sample=\\)"):
        prune("joint", dense, 0.3, calibration=calibration(dense))
    assert sum(parameter.numel() for parameter in dense.parameters()) == before
