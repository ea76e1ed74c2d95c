"""Whole blocks bypassed, on tiny random models of the real classes."""
from __future__ import annotations

import copy
import itertools

import pytest
import torch
from accelerate import init_empty_weights
from diffusers.models.resnet import ResnetBlock2D
from test_joint import sampling
from test_surgery import BUILD, FAMILIES, NEEDS_TORCH_25, assert_equal_outputs, build, call_of, run
from test_units import error_on

from pruning import UserError
from pruning.methods import blocks, bypass, prune, surgery


def pruned(dense, rate, known=None, **options):
    model = copy.deepcopy(dense)
    return model, prune("blocks", model, rate, calibration=known or sampling(dense), **options)


def found_in(model):
    return bypass.find(model, call_of(model))


@pytest.mark.parametrize(("family", "names"), [
    ("sd3", [f"transformer_blocks.{place}" for place in range(3)]),
    ("pixart", [f"transformer_blocks.{place}" for place in range(2)]),
    ("sana", [f"transformer_blocks.{place}" for place in range(2)]),
    ("sd15", ["down_blocks.0.resnets.0", "down_blocks.0.attentions.0", "down_blocks.1.resnets.0",
              "mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1",
              "up_blocks.0.resnets.0", "up_blocks.0.resnets.1", "up_blocks.1.resnets.0", "up_blocks.1.attentions.0",
              "up_blocks.1.resnets.1", "up_blocks.1.attentions.1"]),
])
def test_blocks_are_found_in_the_order_in_which_they_run(family, names):
    assert list(found_in(build(family))) == names


def test_a_spatial_transformer_of_several_blocks_counts_as_these():
    found = found_in(build("sdxl"))
    assert "mid_block.attentions.0.transformer_blocks.1" in found
    assert "mid_block.attentions.0" not in found


def test_text_and_image_keep_their_streams_where_their_shapes_are_equal():
    model = build("sd3")
    arguments = call_of(model)
    generator = torch.Generator().manual_seed(0)
    arguments["encoder_hidden_states"] = torch.randn(2, 16, 24, generator=generator)  # as many tokens as patches
    found = bypass.find(model, arguments)
    assert list(found.values()) == [["encoder_hidden_states", "hidden_states"]] * 2 + [[None, "hidden_states"]]


@FAMILIES
def test_a_bypassed_block_equals_one_whose_last_layers_are_zero(family):
    """Each block alone, so that a wrong stream of any of them shows."""
    dense = build(family)
    for name, streams in found_in(dense).items():
        removed, zeroed = copy.deepcopy(dense), copy.deepcopy(dense)
        bypass.take_out(removed, {name: streams})
        blocks.zero(zeroed, {name: streams}, call_of(dense))
        assert_equal_outputs(removed, zeroed, dense)


@FAMILIES
@pytest.mark.parametrize("rate", [0.3, 0.7])
def test_removed_equals_masked_and_the_rate_is_met(family, rate):
    dense = build(family)
    known = sampling(dense)
    removed, done = pruned(dense, rate, known)
    masked, zeroed = pruned(dense, rate, known, mask_only=True)
    assert done == zeroed
    assert done.taken == done.asked == round(rate * done.total) == sum(
        isinstance(module, bypass.Bypass) for module in removed.modules())
    assert not any(isinstance(module, bypass.Bypass) for module in masked.modules())
    assert_equal_outputs(removed, masked)


@FAMILIES
def test_the_refit_lowers_the_error(family):
    dense = build(family)
    known = sampling(dense)
    refitted, plain = (pruned(dense, 0.4, known, refit=refit)[0] for refit in (True, False))
    assert error_on(refitted, known.calls) <= error_on(plain, known.calls)


def test_the_refit_lowers_the_error_much_where_blocks_are_followed_by_others():
    dense = build("sd15")
    known = sampling(dense)
    gone = {"down_blocks.0.attentions.0": ["hidden_states"]}
    errors = []
    for aims in (None, blocks.aims_of(dense, known)):
        model = copy.deepcopy(dense)
        blocks.take_out(model, gone, aims, False, known)
        errors.append(error_on(model, known.calls))
    assert errors[1] < 0.5 * errors[0]


def test_blocks_go_in_the_order_of_the_latents_without_them():
    """Brute force: each next block is the one with the least error beside those that are gone."""
    dense = build("sd3")
    known, found = sampling(dense), found_in(dense)
    order = blocks.order_of(dense, found, known)
    latents = known.latents(dense, 1)

    def error(gone):
        with bypass.bypassed(dense, {name: found[name] for name in gone}):
            return float((known.latents(dense, 1) - latents).square().mean() / latents.var())

    assert order.alone == {name: pytest.approx(error([name])) for name in found}
    gone = []
    for name, reached in itertools.takewhile(lambda each: each[1] < blocks.LOST, zip(order.names, order.errors)):
        assert reached == pytest.approx(error([*gone, name]))
        assert not gone or reached <= min(error([*gone, other]) for other in found if other not in gone) + 1e-6
        gone.append(name)
    assert sorted(order.names) == sorted(found)


def test_measuring_the_order_changes_nothing():
    dense = build("sd15")
    before = copy.deepcopy(dense.state_dict())
    blocks.order_of(dense, found_in(dense), sampling(dense))
    assert not hasattr(dense, "removals")
    assert list(before) == list(dense.state_dict())
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())


@FAMILIES
def test_the_removal_is_replayed_without_weights(family):
    dense = build(family)
    removed, _ = pruned(dense, 0.5)
    with init_empty_weights():
        again = BUILD[family]()
    for plan in removed.removals:
        surgery.apply(again, plan)
    again.load_state_dict(removed.state_dict(), strict=True, assign=True)
    assert torch.equal(run(again.eval()), run(removed))


@pytest.mark.parametrize(("plan", "words"), [
    ({"transformer_blocks.9.blocks": ["hidden_states"]}, "has no block transformer_blocks.9"),
    ({"norm_out.blocks": ["hidden_states"]}, "has no block norm_out"),
    ({"transformer_blocks.0.blocks": ["weights"]}, "must be names of its arguments"),
    ({"transformer_blocks.0.blocks": []}, "must be names of its arguments"),
])
def test_a_plan_that_does_not_fit_is_refused_and_changes_nothing(plan, words):
    model = build("sd3")
    before = run(model)
    with pytest.raises(UserError, match=words):
        surgery.apply(model, plan)
    assert torch.equal(run(model), before)


@pytest.mark.parametrize(("family", "gone", "changed"), [
    ("sd3", ["transformer_blocks.1"], {"num_layers": 2}),
    ("sd35", ["transformer_blocks.0"], {"num_layers": 2, "dual_attention_layers": [0]}),
    ("pixart", ["transformer_blocks.0"], {"num_layers": 1}),
    ("sana", ["transformer_blocks.1"], {"num_layers": 1}),
    pytest.param("flux_dev", ["transformer_blocks.1", "single_transformer_blocks.0"],
                 {"num_layers": 1, "num_single_layers": 1}, marks=NEEDS_TORCH_25),
])
def test_a_denoiser_with_fewer_blocks_is_one_of_its_class(family, gone, changed):
    dense = build(family)
    found = found_in(dense)
    bypass.take_out(dense, {name: found[name] for name in gone})
    plain = bypass.plain(dense)
    assert type(plain) is type(dense)
    assert not any(isinstance(module, bypass.Bypass) for module in plain.modules())
    assert {name: plain.config[name] for name in changed} == changed
    assert torch.equal(run(plain), run(dense))
    assert plain.state_dict().keys() == type(dense).from_config(plain.config).state_dict().keys()


@pytest.mark.parametrize(("family", "gone"), [
    ("sd3", "transformer_blocks.2"),  # the block before it has weights that a last block has not
    ("sd15", "mid_block.attentions.0"),
])
def test_what_no_config_can_say_is_not_said(family, gone):
    dense = build(family)
    bypass.take_out(dense, {gone: found_in(dense)[gone]})
    assert bypass.plain(dense) is None


def test_other_removals_are_not_said_by_a_config():
    dense = build("pixart")
    bypass.take_out(dense, {"transformer_blocks.0": ["hidden_states"]})
    surgery.apply(dense, {"transformer_blocks.1.ff.neurons": [0, 1, 2]})
    assert bypass.plain(dense) is None


def test_rate_0_changes_nothing():
    model, done = pruned(build("sd15"), 0.0)
    assert (done.taken, done.asked) == (0, 0)
    assert torch.equal(run(model), run(build("sd15")))


def test_a_shortcut_stays():
    dense = build("sd15")
    name = next(name for name, module in dense.named_modules()
                if type(module) is ResnetBlock2D and module.conv_shortcut is not None)
    model = copy.deepcopy(dense)
    bypass.take_out(model, {name: ["input_tensor"]})
    assert model.get_submodule(f"{name}.conv_shortcut").weight.shape == \
        dense.get_submodule(f"{name}.conv_shortcut").weight.shape
