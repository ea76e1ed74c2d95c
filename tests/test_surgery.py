"""The removing methods, on tiny random models of the real classes: removed must equal masked."""
from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers import (
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruning import UserError, methods
from pruning.methods import allocation, kinds, surgery
from pruning.metrics import costs
from pruning.models.provenance import release

UNET = dict(sample_size=8, layers_per_block=1, norm_num_groups=8, block_out_channels=(32, 64),
            cross_attention_dim=24, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
SD3 = dict(sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8,
           num_attention_heads=4, joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=16,
           pos_embed_max_size=4)
FLUX = dict(patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=4, joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8))
SANA = dict(in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=2,
            num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=24,
            sample_size=8)
BUILD = {
    "sd15": lambda: UNet2DConditionModel(**UNET, attention_head_dim=4),
    "sdxl": lambda: UNet2DConditionModel(**dict(
        UNET, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 8), transformer_layers_per_block=(1, 2), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64)),
    "scale_shift": lambda: UNet2DConditionModel(**dict(
        UNET, down_block_types=("AttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "AttnUpBlock2D")), attention_head_dim=8,
        resnet_time_scale_shift="scale_shift", upcast_attention=True),
    "pixart": lambda: PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, num_layers=2, cross_attention_dim=32, caption_channels=24,
        sample_size=8, out_channels=8),
    "sd3": lambda: SD3Transformer2DModel(**SD3),
    "sd35": lambda: SD3Transformer2DModel(**SD3, dual_attention_layers=(0, 1), qk_norm="rms_norm"),
    "flux_dev": lambda: FluxTransformer2DModel(**FLUX, guidance_embeds=True),
    "flux_schnell": lambda: FluxTransformer2DModel(**FLUX, guidance_embeds=False),
    "sana": lambda: SanaTransformer2DModel(**SANA),
}
UNITS = {"structured": ("neurons", "channels"), "attention_heads": ("heads",)}
PLAN = {"structured": partial(allocation.equal_shares, score=surgery.root_mean_square),
        "attention_heads": partial(allocation.lowest_overall, score=surgery.root_mean_square)}
NEEDS_TORCH_25 = pytest.mark.skipif(release("torch") < (2, 5), reason="diffusers' Flux needs torch 2.5")
FAMILIES = pytest.mark.parametrize("family", [
    pytest.param(name, marks=NEEDS_TORCH_25) if name.startswith("flux") else name for name in BUILD])
METHODS = pytest.mark.parametrize("method", list(UNITS))
RATES = pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])


def prune(method, model, rate, **options):
    """Prune by norm and without re-fit, which needs no calibration."""
    return methods.prune(method, model, rate, criterion="norm", refit=False, **options)


def build(family):
    """A random model whose biases and norm weights are random too, as fresh ones are zero and one."""
    torch.manual_seed(0)
    model = BUILD[family]().eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.3)
    return model


def call_of(model, dtype=torch.float32, seed=1):
    """The arguments of a call of two latents, with some tokens of the caption masked out if it takes a mask."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    inputs = dict(encoder_hidden_states=randn(2, 5, 24), timestep=torch.tensor([7, 400]))
    x, pooled = randn(2, 4, 8, 8), randn(2, 16)
    if isinstance(model, SD3Transformer2DModel):
        inputs["pooled_projections"] = pooled
    elif isinstance(model, FluxTransformer2DModel):
        x = x.flatten(2).transpose(1, 2)
        rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
        places = torch.stack([torch.zeros(64), rows.flatten(), columns.flatten()], 1)
        inputs.update(pooled_projections=pooled, timestep=torch.tensor([0.007, 0.4], dtype=dtype),
                      img_ids=places, txt_ids=torch.zeros(5, 3),
                      guidance=torch.tensor([3.5, 3.5]) if model.config.guidance_embeds else None)
    else:
        inputs["encoder_attention_mask"] = mask
    if isinstance(model, PixArtTransformer2DModel):
        inputs["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    elif getattr(model.config, "addition_embed_type", None):
        inputs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": randn(2, 6)}
    return {"sample" if isinstance(model, UNet2DConditionModel) else "hidden_states": x, **inputs}


def run(model, dtype=torch.float32):
    """The model's output on one fixed input."""
    with torch.no_grad():
        return model(**call_of(model, dtype)).sample


def assert_equal_outputs(one, other, dense=None):
    one, other = run(one), run(other)
    assert (one - other).abs().max() <= 1e-5 * other.abs().max()
    if dense is not None:
        assert (one - run(dense)).abs().max() > 1e-3 * other.abs().max()


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def groups(model, method):
    return surgery.survey(model, *UNITS[method])[0]


@FAMILIES
@METHODS
@RATES
def test_removed_equals_masked_and_the_count_is_the_asked(family, method, rate):
    dense = build(family)
    removed, masked = copy.deepcopy(dense), copy.deepcopy(dense)
    total = sum(group.units for group in groups(dense, method))
    before = parameters(dense)

    done = prune(method, removed, rate)
    assert done == prune(method, masked, rate, mask_only=True)
    assert (done.total, done.asked) == (total, round(rate * total))
    assert done.taken == done.asked == total - sum(group.units for group in groups(removed, method))
    assert_equal_outputs(removed, masked, dense)

    gone = before - parameters(removed)
    assert gone > 0.5 * rate * sum(part.layer.weight.numel() for group in groups(dense, method)
                                   for part in group.parts())
    assert parameters(masked) == before
    # A mask zeroes all that removal takes out, except the norms inside an attention that has no head left.
    left = {name for name, _ in removed.named_parameters()}
    zeros = sum(p.numel() if ".norm" in name and "attn" in name and name not in left else int((p == 0).sum())
                for name, p in masked.named_parameters())
    assert zeros == gone


@FAMILIES
@METHODS
def test_the_cost_of_a_call_falls_with_removal_and_not_with_a_mask(family, method):
    dense = build(family)
    removed, masked = copy.deepcopy(dense), copy.deepcopy(dense)
    prune(method, removed, 0.9)
    prune(method, masked, 0.9, mask_only=True)
    for count in (costs.count_macs, costs.peak_bytes):
        before, after, same = (count(model, call_of(model)) for model in (dense, removed, masked))
        assert after < before == same


@FAMILIES
@METHODS
def test_rate_zero_changes_nothing(family, method):
    dense = build(family)
    pruned = copy.deepcopy(dense)
    assert prune(method, pruned, 0.0).taken == 0
    assert torch.equal(run(pruned), run(dense))


@FAMILIES
@METHODS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_and_runs(family, method, dtype):
    model = build(family)
    reference = copy.deepcopy(model).to(dtype).float()
    unrounded = {"round_to": 1} if method == "structured" else {}
    done = prune(method, reference, 0.5)
    model = model.to(dtype)
    assert prune(method, model, 0.5, **unrounded) == done
    assert {p.dtype for p in model.parameters()} == {dtype}
    out = run(model, dtype)
    assert out.dtype == dtype
    assert (out.float() - run(reference)).abs().max() < 0.1 * run(reference).abs().max()


@FAMILIES
def test_a_pruned_model_can_be_pruned_again(family):
    dense = build(family)
    removed = copy.deepcopy(dense)
    prune("structured", removed, 0.4)
    prune("attention_heads", removed, 0.4)
    masked = copy.deepcopy(removed)
    for method in UNITS:
        done, expected = prune(method, removed, 0.5), prune(method, masked, 0.5, mask_only=True)
        assert done[:6] == expected[:6]  # what other methods reach has become smaller in one of them
    assert_equal_outputs(removed, masked)

    once = copy.deepcopy(dense)  # channels removed in two steps count as zeros like those removed in one
    norm_groups = next((g.norm_groups for g in groups(dense, "structured") if g.kind.unit == "channels"), 1)
    for group in groups(dense, "structured"):
        if group.kind.unit == "channels":
            width = group.units // norm_groups
            firsts = [start + i for start in range(0, group.units, width) for i in range(width // 2)]
            surgery.apply(once, {group.name: [unit for unit in firsts if unit % width == 0]})
            surgery.apply(dense, {group.name: firsts})
            surgery.apply(dense, {group.name: list(range(0, len(firsts), width // 2))})
    assert_equal_outputs(once, dense)


@METHODS
@pytest.mark.parametrize("family", ["sd15", "pixart"])
def test_removed_equals_masked_with_the_old_attention_processor(method, family):
    removed = build(family)
    removed.set_attn_processor(AttnProcessor())
    masked = copy.deepcopy(removed)
    prune(method, removed, 0.5)
    prune(method, masked, 0.5, mask_only=True)
    assert_equal_outputs(removed, masked)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_removed_equals_masked_with_fused_projections(family):
    removed = build(family)
    removed.fuse_qkv_projections()
    masked = copy.deepcopy(removed)
    plan = {group.name: list(range(1, group.units, 2)) for group in groups(removed, "attention_heads")}
    surgery.apply(removed, plan)
    surgery.apply(masked, plan, mask_only=True)
    assert_equal_outputs(removed, masked)
    unfused = copy.deepcopy(removed)
    unfused.unfuse_qkv_projections()
    assert_equal_outputs(unfused, removed)


def plant(group, units):
    """Make these units by far the weakest of the model."""
    with torch.no_grad():
        for part in group.parts(scored=True):
            own = group.by_unit(part.layer.weight, part)
            own.index_fill_(part.dim + 1, torch.tensor(units, dtype=torch.long), 1e-6)


@FAMILIES
def test_the_heads_of_lowest_weight_go(family):
    model = build(family)
    found = groups(model, "attention_heads")
    planted = {found[0].name: [0], found[-1].name: list(range(found[-1].units))}
    for group in found:
        plant(group, planted.get(group.name, []))
    rate = sum(map(len, planted.values())) / sum(group.units for group in found)
    kept = PLAN["attention_heads"](found, rate)
    assert kept == {found[0].name: list(range(1, found[0].units)), found[-1].name: []}


@FAMILIES
def test_the_neurons_and_channels_of_lowest_norm_go_equally_from_every_norm_group(family):
    model = build(family)
    planted = {}
    for group in groups(model, "structured"):
        width = group.units // group.norm_groups
        planted[group.name] = [start + width - 1 for start in range(0, group.units, width)]
        plant(group, planted[group.name])
    prune("structured", model, 0.5, mask_only=True)
    for group in groups(model, "structured"):
        part = group.parts()[0]
        weight = part.layer.weight
        dead = group.by_unit(weight, part).abs().sum((0, 2, *range(3, weight.dim() + 2))) == 0
        assert dead[planted[group.name]].all()
        assert dead.view(group.norm_groups, -1).sum(1).unique().numel() == 1
        assert abs(int(dead.sum()) - group.units / 2) <= max(2, group.norm_groups / 2)


@pytest.mark.parametrize("rate", [0.01, 0.17, 0.33, 0.5, 0.875, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_structured_reaches_the_rate_or_its_limit(family, rate):
    model = build(family)
    found = groups(model, "structured")
    limit = sum(group.units - group.norm_groups for group in found)
    done = prune("structured", model, rate)
    assert done.taken == min(done.asked, limit)
    run(model)


@FAMILIES
def test_half_precision_leaves_widths_that_gpus_like(family):
    half, full = build(family).to(torch.bfloat16), build(family).to(torch.bfloat16).float()
    assert prune("structured", half, 0.3) == prune("structured", full, 0.3, round_to=8)
    assert parameters(half) == parameters(full)


@FAMILIES
@pytest.mark.parametrize("round_to", [4, 16])
def test_widths_are_left_round_where_they_were_and_removed_equals_masked(family, round_to):
    removed = build(family)
    masked = copy.deepcopy(removed)
    round_before = [group.name for group in groups(removed, "structured") if group.units % round_to == 0]
    done = prune("structured", removed, 0.3, round_to=round_to)
    assert prune("structured", masked, 0.3, mask_only=True, round_to=round_to) == done
    assert round_before
    assert all(group.units % round_to == 0 for group in groups(removed, "structured") if group.name in round_before)
    assert done.taken == pytest.approx(done.asked, abs=round_to * len(groups(masked, "structured")))
    assert_equal_outputs(removed, masked)


@FAMILIES
def test_heads_can_be_fewer_than_layers(family):
    removed = build(family)
    masked = copy.deepcopy(removed)
    found = groups(removed, "attention_heads")
    rate = 1 - 1 / sum(group.units for group in found)
    done = prune("attention_heads", removed, rate)
    prune("attention_heads", masked, rate, mask_only=True)
    assert done.total - done.taken == 1 < len(found)
    assert sum(isinstance(module, kinds.HeadlessAttention) for module in removed.modules()) == len(found) - 1
    assert surgery.survey(removed, "heads")[1] == {}  # neither a stand-in for an attention nor its block is unknown
    assert_equal_outputs(removed, masked)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 6, 16), (2, 16, 3, 2)])
def test_an_attention_without_heads_returns_its_output_bias(bias, shape):
    attention = Attention(16, heads=2, dim_head=8, out_bias=bias)
    x = torch.randn(shape)
    out = kinds.HeadlessAttention(attention)(x, encoder_hidden_states=torch.randn(2, 3, 16))
    want = attention.to_out[0].bias if bias else torch.zeros(16)
    assert torch.equal(out, want.view(-1, *(1,) * (len(shape) - 2)).expand(shape) if len(shape) == 4
                       else want.expand(shape))


@pytest.mark.parametrize("shape", [(2, 6, 16), (2, 16, 3, 2)])
@pytest.mark.parametrize("kept", [[], [1]])
def test_removed_equals_masked_in_an_attention_with_norm_residual_and_rescaling(shape, kept):
    attention = Attention(16, heads=2, dim_head=8, bias=True, residual_connection=True, rescale_output_factor=1.7,
                          norm_num_groups=4, qk_norm="rms_norm")
    removed, masked = nn.Sequential(attention), nn.Sequential(copy.deepcopy(attention))
    surgery.apply(removed, {"0.heads": kept})
    surgery.apply(masked, {"0.heads": kept}, mask_only=True)
    x = torch.randn(shape)
    assert torch.allclose(removed(x), masked(x), atol=1e-6)


@pytest.mark.parametrize("activation", ["geglu", "gelu", "gelu-approximate", "geglu-approximate", "swiglu",
                                        "linear-silu"])
@pytest.mark.parametrize("bias", [True, False])
def test_every_activation_of_a_feed_forward_is_removed_as_masked(activation, bias):
    removed = nn.Sequential(FeedForward(8, dim_out=6, activation_fn=activation, bias=bias, final_dropout=True)).eval()
    masked = copy.deepcopy(removed)
    prune("structured", removed, 0.75)
    prune("structured", masked, 0.75, mask_only=True)
    x = torch.randn(2, 3, 8)
    assert removed[0].net[2].in_features == 8
    assert torch.allclose(removed(x), masked(x), atol=1e-6)


@pytest.mark.parametrize("options", [{"up": True}, {"down": True}, {"conv_2d_out_channels": 8}, {"groups_out": 2},
                                     {"skip_time_act": True, "output_scale_factor": 1.4}])
def test_every_sort_of_resnet_block_is_removed_as_masked(options):
    removed = nn.ModuleList([ResnetBlock2D(in_channels=16, out_channels=32, temb_channels=12, groups=4, **options)])
    masked = copy.deepcopy(removed)
    assert prune("structured", removed, 0.5).taken == 16
    prune("structured", masked, 0.5, mask_only=True)
    x, temb = torch.randn(2, 16, 4, 4), torch.randn(2, 12)
    assert torch.allclose(removed[0](x, temb), masked[0](x, temb), atol=1e-5)


@pytest.mark.parametrize(("shape", "memory_format"), [
    ((3, 24, 5, 4), torch.contiguous_format), ((3, 24, 5, 4), torch.channels_last),
    ((3, 24, 7), torch.contiguous_format)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", ["of_padded", "of_statistics"])
def test_pruned_group_norm_is_the_dense_one_with_zeroed_channels(shape, memory_format, dtype, way):
    x = (torch.randn(shape, dtype=dtype) * 2 + 5).to(memory_format=memory_format)
    for dense_channels in (24, 48):
        norm = kinds.PrunedGroupNorm(6, 24, dense_channels, 1e-5).to_empty(device="cpu").to(dtype)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        padding = torch.zeros(shape[0], 6, (dense_channels - 24) // 6, *shape[2:], dtype=dtype)
        padded = torch.cat([x.unflatten(1, (6, -1)), padding], 2).flatten(1, 2)
        want = F.group_norm(padded, 6, None, None, 1e-5).unflatten(1, (6, -1))[:, :, :4].flatten(1, 2)
        want = want * norm.weight.view(-1, *(1,) * (len(shape) - 2)) + norm.bias.view(-1, *(1,) * (len(shape) - 2))
        assert torch.allclose(getattr(norm, way)(x), want, atol=1e-5 if dtype == torch.float32 else 1e-11)


def test_pruned_group_norm_has_gradients():
    norm = kinds.PrunedGroupNorm(2, 4, 12, 1e-5).to_empty(device="cpu").double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,))


@FAMILIES
@METHODS
def test_a_plan_replayed_on_the_meta_device_takes_the_weights(family, method):
    pruned = build(family)
    plan = PLAN[method](groups(pruned, method), 0.8)
    surgery.apply(pruned, plan)
    with init_empty_weights():  # parameters only: position tables are computed, not loaded
        rebuilt = type(pruned).from_config(pruned.config)
    surgery.apply(rebuilt, plan)
    assert all(p.is_meta for p in rebuilt.parameters())
    rebuilt.load_state_dict(pruned.state_dict(), strict=True, assign=True)
    assert torch.equal(run(rebuilt.eval()), run(pruned))


BAD_PLANS = {"out of range": [0, 1, 8], "repeated": [0, 0, 1], "descending": [1, 0], "negative": [-1, 2],
             "no number": ["0", "1"]}


@pytest.mark.parametrize("keep", list(BAD_PLANS.values()), ids=list(BAD_PLANS))
def test_a_bad_plan_is_refused_before_anything_changes(keep):
    model = build("sdxl")
    before = parameters(model)
    names = [group.name for group in groups(model, "attention_heads")]
    with pytest.raises(UserError, match=names[-1].replace(".", r"\.")):
        surgery.apply(model, {names[0]: [0], names[-1]: keep})
    with pytest.raises(UserError, match="no such.heads"):
        surgery.apply(model, {names[0]: [0], "no such.heads": [0]})
    resnet = next(group for group in groups(model, "structured") if group.kind.unit == "channels")
    with pytest.raises(UserError, match="norm groups"):
        surgery.apply(model, {resnet.name: [0, 1]})
    with pytest.raises(UserError, match="ascending"):
        surgery.apply(model, {resnet.name: []})
    assert parameters(model) == before


@pytest.mark.parametrize("norm", ["rms_norm_across_heads", "layer_norm_across_heads"])
def test_a_norm_across_heads_takes_its_statistics_over_the_heads_left(norm):
    """The one case in which removed is not masked; removed equals an attention built with fewer heads."""
    dense = Attention(16, heads=4, kv_heads=4, dim_head=8, qk_norm=norm, processor=SanaAttnProcessor2_0())
    for parameter in dense.parameters():
        nn.init.normal_(parameter)
    keep, places = [1, 2], slice(8, 24)
    removed, masked = nn.Sequential(copy.deepcopy(dense)), nn.Sequential(copy.deepcopy(dense))
    surgery.apply(removed, {"0.heads": keep})
    surgery.apply(masked, {"0.heads": keep}, mask_only=True)
    fewer = Attention(16, heads=2, kv_heads=2, dim_head=8, qk_norm=norm, processor=SanaAttnProcessor2_0())
    fewer.load_state_dict({name: value if name == "to_out.0.bias" else value[:, places] if name == "to_out.0.weight"
                           else value[places] for name, value in dense.state_dict().items()})
    x = torch.randn(2, 6, 16)
    assert torch.allclose(removed(x), fewer(x), atol=1e-6)
    assert not torch.allclose(removed(x), masked(x), atol=1e-3)


def test_sana_with_a_norm_across_heads_loses_neurons_exactly_and_heads_as_if_built_with_fewer():
    torch.manual_seed(0)
    dense = SanaTransformer2DModel(**SANA, qk_norm="rms_norm_across_heads").eval()
    for method, equal in (("structured", True), ("attention_heads", False)):
        removed, masked = copy.deepcopy(dense), copy.deepcopy(dense)
        assert prune(method, removed, 0.5) == prune(method, masked, 0.5, mask_only=True)
        assert torch.allclose(run(removed), run(masked), rtol=0, atol=1e-5) is equal


@NEEDS_TORCH_25
def test_a_block_whose_heads_and_neurons_share_a_layer_keeps_its_neurons_when_it_loses_all_heads():
    removed = build("flux_dev")
    masked = copy.deepcopy(removed)
    plan = {"single_transformer_blocks.0.heads": [], "single_transformer_blocks.1.heads": [3]}
    surgery.apply(removed, plan)
    surgery.apply(masked, plan, mask_only=True)
    assert_equal_outputs(removed, masked)
    assert removed.single_transformer_blocks[0].proj_out.in_features == 256
    assert not any(group.name.startswith("single_transformer_blocks.0") for group in groups(removed, "attention_heads"))
    for model, mask_only in ((removed, False), (masked, True)):
        surgery.apply(model, {"single_transformer_blocks.0.neurons": [0, 9, 255]}, mask_only)
    assert_equal_outputs(removed, masked)


@METHODS
def test_a_denoiser_without_units_is_an_error_that_names_its_class_and_the_method(method):
    model = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(UserError, match=f"TransformerEncoderLayer.*{method}"):
        prune(method, model, 0.5)


@METHODS
@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_rates_outside_the_range_are_refused(method, rate):
    with pytest.raises(UserError, match="rate"):
        prune(method, build("pixart"), rate)


def test_what_cannot_be_removed_exactly_is_skipped_with_the_reason():
    class OddProcessor:
        """A processor that diffusers does not have."""

    plain, odd, grouped, tied, wrapped = (
        Attention(16, heads=2, dim_head=8, **options) for options in (
            {}, {"processor": OddProcessor()}, {"kv_heads": 1}, {}, {}))
    tied.to_v.weight = tied.to_k.weight
    wrapped.to_q = nn.Sequential(wrapped.to_q)
    model = nn.ModuleDict(dict(plain=plain, odd=odd, grouped=grouped, tied=tied, wrapped=wrapped))
    found, skipped = surgery.survey(model, "heads")
    assert [group.name for group in found] == ["plain.heads"]
    assert {name: why.split()[-1] for name, why in skipped.items()} == {
        "odd": "OddProcessor", "grouped": "grouped", "tied": "layer", "wrapped": "Sequential"}
    assert prune("attention_heads", model, 0.5).total == 2
    del model["plain"]
    with pytest.raises(UserError, match="OddProcessor"):
        prune("attention_heads", model, 0.5)


@METHODS
def test_a_module_used_in_two_places_is_pruned_once(method):
    removed = build("pixart")
    removed.transformer_blocks[1] = removed.transformer_blocks[0]
    masked = copy.deepcopy(removed)
    rate = 0.8 if method == "attention_heads" else 0.5
    prune(method, removed, rate)
    prune(method, masked, rate, mask_only=True)
    assert_equal_outputs(removed, masked)


@METHODS
def test_equal_scores_are_broken_the_same_way_each_time(method):
    model = build("pixart")
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.1)
    kept = PLAN[method](groups(model, method), 0.5)
    assert kept == PLAN[method](groups(copy.deepcopy(model), method), 0.5)
    for group in groups(model, method):
        keep = kept.get(group.name, list(range(group.units)))
        assert keep == list(range(group.units))[group.units - len(keep):]  # the first go


# ---- criteria

@given(st.lists(st.tuples(st.sampled_from([1, 4, 8, 32]), st.integers(1, 10)), min_size=1, max_size=5),
       st.floats(0, 0.99))
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_equal_shares_are_in_sum_as_near_to_what_was_asked_for_as_norm_groups_allow(shapes, rate):
    """In UNets of ResNets alone, all units go by whole norm groups, and a few finer ones make up for little."""
    found = [surgery.Group(str(i), nn.Module(), GATES, step * count, step) for i, (step, count) in enumerate(shapes)]
    asked, sums = round(rate * sum(group.units for group in found)), {0}
    for group in found:
        sums = {total + lost for total in sums for lost in range(0, group.units, group.norm_groups)}
    counts = allocation.drop_counts(found, rate)
    assert all(count % group.norm_groups == 0 <= count < group.units
               for group, count in zip(found, map(counts.get, (group.name for group in found))))
    assert abs(sum(counts.values()) - asked) == min(abs(total - asked) for total in sums)


@METHODS
def test_the_score_decides_which_units_go(method):
    """With the opposite of the usual score, the units of highest weights go."""
    model = build("sd15")
    found = groups(model, method)
    order = {"structured": allocation.equal_shares, "attention_heads": allocation.lowest_overall}[method]
    kept = order(found, 0.5, lambda group: -surgery.root_mean_square(group))
    gone = {group.name: sorted(set(range(group.units)) - set(kept.get(group.name, range(group.units))))
            for group in found}
    sets = [found] if method == "attention_heads" else [[group] for group in found if group.norm_groups == 1]
    for together in sets:
        scores = {group.name: surgery.root_mean_square(group) for group in together}
        lost = torch.cat([scores[group.name][gone[group.name]] for group in together])
        left = torch.cat([scores[group.name][kept.get(group.name, slice(None))] for group in together])
        assert lost.numel() == pytest.approx(0.5 * (lost.numel() + left.numel()), abs=1)
        assert lost.min() > left.max()


@METHODS
@pytest.mark.parametrize(("score", "error", "message"), [
    (lambda group: torch.full((group.units,), float("nan")), UserError, "has scores that are NaN"),
    (lambda group: torch.zeros(1), ValueError, r"is \(1,\) for"),
])
def test_scores_without_an_order_are_refused(method, score, error, message):
    with pytest.raises(error, match=message):
        PLAN[method](groups(build("pixart"), method), 0.5, score=score)


# ---- new kinds

class Gated(nn.Module):
    """A module that no row of KINDS describes, with two gates of three places each."""

    def __init__(self):
        super().__init__()
        self.open, self.close = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x):
        return x + self.close(self.open(x).relu())


GATES = kinds.Kind("gates", ("Gated",), rows=("open",), columns=("close",), units=lambda m: m.close.in_features // 3)


@pytest.fixture
def gates(monkeypatch):
    monkeypatch.setattr(kinds, "KINDS", (*kinds.KINDS, GATES))


def test_a_row_with_a_new_unit_is_all_that_a_new_kind_needs(gates):
    removed = nn.Sequential(Gated(), Gated())
    masked = copy.deepcopy(removed)
    found, skipped = surgery.survey(removed, "gates")
    assert ([(group.name, group.units) for group in found], skipped) == ([("0.gates", 2), ("1.gates", 2)], {})
    plan = allocation.equal_shares(found, 0.5, surgery.root_mean_square)
    surgery.apply(removed, plan)
    surgery.apply(masked, plan, mask_only=True)
    assert [layer.open.out_features for layer in removed] == [3, 3]
    x = torch.randn(5, 8)
    assert torch.allclose(removed(x), masked(x), atol=1e-6)
    rebuilt = nn.Sequential(Gated(), Gated()).to("meta")
    surgery.apply(rebuilt, removed.removals[0])
    rebuilt.load_state_dict(removed.state_dict(), strict=True, assign=True)
    assert torch.equal(rebuilt(x), removed(x))


@METHODS
@pytest.mark.parametrize("family", ["sd15", "sd35"])
def test_a_row_with_a_new_unit_leaves_other_methods_as_they_were(family, method, monkeypatch):
    expected = build(family)
    before = prune(method, expected, 0.5)
    monkeypatch.setattr(kinds, "KINDS", (*kinds.KINDS, GATES, GATES._replace(lookalikes="block|attn|feed|res")))
    model = build(family)
    assert prune(method, model, 0.5) == before
    assert model.removals == expected.removals
    assert torch.equal(run(model), run(expected))


def test_unknown_modules_are_named_by_the_words_of_the_units_asked_for(gates, monkeypatch):
    class OddGate(nn.Linear):
        pass

    model = nn.ModuleDict({"odd": OddGate(2, 2), "gated": Gated()})
    assert surgery.survey(model, "gates")[1] == {}  # without words in the row, none are named
    monkeypatch.setattr(kinds, "KINDS", (*kinds.KINDS[:-1], GATES._replace(lookalikes="gate")))
    assert surgery.survey(model, "gates")[1] == {"odd": "its class test_surgery.OddGate is not known"}
    assert surgery.survey(model, "heads")[1] == {}


def test_applying_a_plan_looks_for_the_units_of_the_plan_alone(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("not needed")

    model = build("sd15")
    name, units = next((group.name, group.units) for group in groups(model, "attention_heads"))
    monkeypatch.setattr(kinds, "KINDS", tuple(kind if kind.unit == "heads" else kind._replace(obstacle=refuse)
                                              for kind in kinds.KINDS))
    monkeypatch.setattr(surgery, "unknown_modules", refuse)
    surgery.apply(model, {name: [0]})
    assert next(group.units for group in surgery.find_groups(model, ["heads"])[0] if group.name == name) == 1 < units
