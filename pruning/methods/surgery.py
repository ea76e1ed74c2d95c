"""Taking units (heads, neurons, channels) out of a denoiser, or zeroing them in place.

KINDS describes kinds of modules, not models: which layers' rows and columns a
unit owns. Scoring, masking and removing are all read off that one table, so
what is scored is what is zeroed is what is removed.

A plan is {unit name: indices kept, ascending}, with unit names such as
"mid_block.attentions.0.transformer_blocks.0.attn1.heads"; modules that lose
nothing are not in it. Applying it needs no weights, so it can be replayed on
the meta device.

Removed equals masked up to rounding for everything in KINDS, but for one case:
a query or key norm that runs across heads takes its statistics over the heads
that are left, where a mask leaves zeros in them.
"""
from __future__ import annotations

import re
from collections import Counter
from typing import Callable, Dict, Iterator, List, NamedTuple, Tuple

import torch
from diffusers.models import activations, normalization
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.sana_transformer import GLUMBConv
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxSingleTransformerBlock
from torch import Tensor, nn

from pruning import UserError
from pruning.methods import METHODS, Pruned

Plan = Dict[str, List[int]]  # {group name: indices of the units kept, ascending}

# Attention processors whose heads work apart from each other between the layers that KINDS names.
PROCESSORS = {"AttnProcessor", "AttnProcessor2_0", "FusedAttnProcessor2_0", "SlicedAttnProcessor",
              "XFormersAttnProcessor", "AttnProcessorNPU", "SanaAttnProcessor2_0", "SanaLinearAttnProcessor2_0",
              "JointAttnProcessor2_0", "FusedJointAttnProcessor2_0", "XFormersJointAttnProcessor", "FluxAttnProcessor"}
ACTIVATIONS = (activations.GELU, activations.ApproximateGELU, activations.LinearActivation,
               activations.GEGLU, activations.SwiGLU)


class PrunedGroupNorm(nn.GroupNorm):
    """GroupNorm in whose statistics the removed channels still count, as zeros.

    So it gives what the dense norm gives when those channels are zeroed. With
    s = channels kept / dense channels and the kept channels' mean m and
    (biased) variance v of a group, that group's mean is s m and its variance
    s (v + (1 - s) m^2). Input (batch, channels, ...), float32 statistics.
    """

    def __init__(self, num_groups: int, num_channels: int, dense_channels: int, eps: float):
        super().__init__(num_groups, num_channels, eps, device="meta")
        self.dense_channels = dense_channels

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (batch, channels, ...)."""
        h = x if x.dtype == torch.float64 else x.float()
        if not (h.device.type == "cpu" and h.dim() == 4 and h.is_contiguous(memory_format=torch.channels_last)):
            h = h.contiguous()
        batch, channels = h.shape[:2]
        # The native kernel hands out its statistics, and is up to ten times faster on CPU than var_mean.
        normed, mean, rstd = torch.native_group_norm(h, None, None, batch, channels, h[0, 0].numel(),
                                                     self.num_groups, self.eps)
        share = self.num_channels / self.dense_channels
        variance = rstd**-2 - self.eps
        masked_rstd = (share * (variance + (1 - share) * mean**2) + self.eps).rsqrt()
        weight = self.weight.to(h.dtype).view(1, self.num_groups, -1) * masked_rstd[..., None]
        scale = weight / rstd[..., None]
        shift = weight * ((1 - share) * mean)[..., None] + self.bias.to(h.dtype).view(1, self.num_groups, -1)
        shape = (batch, channels) + (1,) * (h.dim() - 2)
        return torch.addcmul(shift.reshape(shape), normed, scale.reshape(shape)).to(x.dtype)

    def extra_repr(self) -> str:
        """GroupNorm's, and the dense width."""
        return f"{super().extra_repr()}, dense_channels={self.dense_channels}"


class HeadlessAttention(nn.Module):
    """What an attention computes once all its heads are zero: its output bias (and its residual, where it has one).

    Input (batch, tokens, channels) or (batch, channels, height, width), as the attention takes. A joint
    attention yields a second output for the other stream, whose own bias it has. One without an output
    projection yields no channels.
    """

    def __init__(self, attention: nn.Module):
        super().__init__()
        out = attention.to_out[0] if getattr(attention, "to_out", None) is not None else None
        context_out = getattr(attention, "to_add_out", None)
        self.joint = attention.added_kv_proj_dim is not None
        self.residual_connection = getattr(attention, "residual_connection", False)
        self.rescale_output_factor = getattr(attention, "rescale_output_factor", 1.0)
        self.out_features = 0 if out is None else out.out_features
        self.context_out_features = 0 if context_out is None else context_out.out_features
        self.bias = None if out is None else out.bias
        self.context_bias = None if context_out is None else context_out.bias

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor = None, *args, **kwargs):
        """Take what the attention takes; only shapes count, and the hidden states' values for the residual."""
        bias = hidden_states.new_zeros(self.out_features) if self.bias is None else self.bias
        if hidden_states.dim() == 4:
            out = bias[:, None, None].expand_as(hidden_states)
        else:
            out = bias.expand(*hidden_states.shape[:-1], -1)
        if self.residual_connection:
            out = out + hidden_states
        out = out / self.rescale_output_factor
        if not self.joint or encoder_hidden_states is None:
            return out
        bias = out.new_zeros(self.context_out_features) if self.context_bias is None else self.context_bias
        return out, bias.expand(*encoder_hidden_states.shape[:-1], -1).clone()  # torch's counters refuse a bare view


def attention_obstacle(attention: nn.Module) -> str:
    """Why heads cannot be taken out of this attention; "" if they can."""
    processor = type(attention.processor).__name__
    obstacles = {
        f"its processor is {processor}": processor not in PROCESSORS,
        "it has no output projection": getattr(attention, "to_out", None) is None,
        "its key and value heads are grouped": getattr(attention, "inner_kv_dim", attention.inner_dim)
        != attention.inner_dim,
    }
    return next((why for why, found in obstacles.items() if found), "")


def feed_forward_obstacle(feed_forward: FeedForward) -> str:
    """Why neurons cannot be taken out of this FeedForward; "" if they can."""
    activation = type(feed_forward.net[0])
    return "" if activation in ACTIVATIONS else f"its activation is {activation.__name__}"


def resnet_obstacle(resnet: ResnetBlock2D) -> str:
    """Why inner channels cannot be taken out of this ResnetBlock2D; "" if they can."""
    return "" if getattr(resnet.norm2, "affine", True) else "its second norm has no weights"


def shrink_attention(attention: nn.Module, units: int, kept: int) -> None:
    """Bring the numbers that an attention and its processors read in line with its sliced layers."""
    inner = attention.to_q.out_features
    for name, value in (("heads", kept), ("sliceable_head_dim", kept), ("inner_dim", inner), ("inner_kv_dim", inner)):
        if hasattr(attention, name):
            setattr(attention, name, value)


def single_block_heads(block: FluxSingleTransformerBlock) -> Tuple[int, int]:
    """Where in the inputs of proj_out those of the heads begin, and how many they are."""
    return 0, block.proj_out.in_features - block.proj_mlp.out_features


def single_block_neurons(block: FluxSingleTransformerBlock) -> Tuple[int, int]:
    """The same for the neurons, which come after the heads."""
    return block.proj_out.in_features - block.proj_mlp.out_features, block.proj_mlp.out_features


def shrink_single_block(block: FluxSingleTransformerBlock, units: int, kept: int) -> None:
    """Bring the numbers that the block and its attention read in line with their sliced layers."""
    _, heads_inner = single_block_heads(block)
    if heads_inner:
        shrink_attention(block.attn, units, heads_inner // block.attn.head_dim)
    block.mlp_hidden_dim = block.proj_mlp.out_features
    if hasattr(block.proj_out, "_tp_packed_row_blocks"):  # where newer versions of diffusers split it over devices
        block.proj_out._tp_packed_row_blocks = [heads_inner, block.mlp_hidden_dim]


def empty_single_block(block: FluxSingleTransformerBlock) -> FluxSingleTransformerBlock:
    """Leave a block no heads: its output projection reads the neurons alone."""
    old, (start, neurons) = block.proj_out, single_block_neurons(block)
    block.attn = HeadlessAttention(block.attn).train(block.training)
    old.weight = nn.Parameter(old.weight.detach()[:, start:].clone(), requires_grad=old.weight.requires_grad)
    old.in_features = neurons
    shrink_single_block(block, 0, 0)
    return block


def shrink_depthwise(conv: GLUMBConv, units: int, kept: int) -> None:
    """A depthwise convolution has a group a channel."""
    conv.conv_depth.groups = conv.conv_depth.in_channels = conv.conv_depth.out_channels


def shrink_resnet(resnet: ResnetBlock2D, units: int, kept: int) -> None:
    """Let the removed inner channels count as zeros in the second norm. Input and output widths stay."""
    old = resnet.norm2
    dense_channels = getattr(old, "dense_channels", units)
    resnet.norm2 = PrunedGroupNorm(old.num_groups, kept, dense_channels, old.eps).train(old.training)
    resnet.norm2.weight, resnet.norm2.bias = old.weight, old.bias


class Kind(NamedTuple):
    """A kind of module that units can be taken out of. Layers are paths in the module; absent ones are passed over.

    A unit owns inner width / units adjacent places of the module's inner width.
    A layer with n times as many rows (gate and value, scale and shift, fused q,
    k and v) has n such blocks.
    """

    unit: str
    module: type
    rows: Tuple[str, ...]  # layers of whose outputs a unit owns some
    columns: Tuple[str, ...]  # layers of whose inputs a unit owns some
    units: Callable[[nn.Module], int]
    obstacle: Callable[[nn.Module], str] = lambda module: ""  # why units cannot be taken out
    follows: Tuple[str, ...] = ()  # as rows, but not scored: copies of other layers, and norms of the inner width
    span: Callable[[nn.Module], Tuple[int, int]] = None  # first of the columns that are units', and how many are;
    # None: all, and the first layer of columns tells how many
    norm_groups: Callable[[nn.Module], int] = lambda module: 1  # each must lose the same number of units
    shrink: Callable[[nn.Module, int, int], None] = lambda module, units, kept: None  # after the layers are sliced
    empty: Callable[[nn.Module], nn.Module] = None  # what stands in when no unit is left; None: one must stay


QKV = ("to_q", "to_k", "to_v")
ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")
QK_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
KINDS = (
    Kind("heads", Attention, rows=QKV + ADDED_QKV, columns=("to_out.0", "to_add_out"), units=lambda m: m.heads,
         follows=("to_qkv", "to_kv", "to_added_qkv", *QK_NORMS),
         obstacle=attention_obstacle, shrink=shrink_attention, empty=HeadlessAttention),
    Kind("heads", FluxAttention, rows=QKV + ADDED_QKV, columns=("to_out.0", "to_add_out"), units=lambda m: m.heads,
         follows=("to_qkv", "to_added_qkv"),
         obstacle=attention_obstacle, shrink=shrink_attention, empty=HeadlessAttention),
    Kind("heads", FluxSingleTransformerBlock, rows=tuple(f"attn.{name}" for name in QKV), columns=("proj_out",),
         follows=("attn.to_qkv",), units=lambda m: getattr(m.attn, "heads", 0), span=single_block_heads,
         shrink=shrink_single_block, empty=empty_single_block),
    Kind("neurons", FeedForward, rows=("net.0.proj",), columns=("net.2",),
         units=lambda m: m.net[2].in_features, obstacle=feed_forward_obstacle),
    Kind("neurons", FluxSingleTransformerBlock, rows=("proj_mlp",), columns=("proj_out",),
         units=lambda m: m.proj_mlp.out_features, span=single_block_neurons, shrink=shrink_single_block),
    Kind("neurons", GLUMBConv, rows=("conv_inverted", "conv_depth"), columns=("conv_point",),
         units=lambda m: m.conv_point.in_channels, shrink=shrink_depthwise),
    Kind("channels", ResnetBlock2D, rows=("conv1", "time_emb_proj"), columns=("conv2",), follows=("norm2",),
         units=lambda m: m.conv2.in_channels, obstacle=resnet_obstacle,
         norm_groups=lambda m: m.norm2.num_groups, shrink=shrink_resnet),
)
SOUNDS_LIKE = {"heads": "attn|attention", "neurons": "feed_?forward|ffn|mlp|glu", "channels": "res_?net|resblock"}
# What a layer calls the sizes of its weight's dimensions.
SIZES = {nn.Linear: ("out_features", "in_features"), nn.Conv2d: ("out_channels", "in_channels"),
         nn.GroupNorm: ("num_channels",), PrunedGroupNorm: ("num_channels",), nn.LayerNorm: ("normalized_shape",),
         normalization.RMSNorm: ("dim",)}


class Group(NamedTuple):
    """The units of one module."""

    name: str  # module name and unit, joined by a dot
    module: nn.Module
    kind: Kind
    units: int
    norm_groups: int

    def layers(self, scored: bool = False) -> Iterator[Tuple[nn.Module, int]]:
        """Yield (layer, dimension of its weight along which the units lie)."""
        layers, (_, inner) = dict(self.module.named_modules()), self.span()
        for path in self.kind.rows:
            if path in layers:
                yield layers[path], 0
        for path in self.kind.columns:
            if path in layers:
                yield layers[path], 1
        for path in () if scored else self.kind.follows:
            weight = getattr(layers.get(path), "weight", None)
            if weight is not None and weight.shape[0] % inner == 0:  # a norm of each head alone is narrower
                yield layers[path], 0

    def span(self) -> Tuple[int, int]:
        """The first of the columns that are the units', and how many are, which is the inner width."""
        if self.kind.span:
            return self.kind.span(self.module)
        return 0, self.module.get_submodule(self.kind.columns[0]).weight.shape[1]

    def by_unit(self, tensor: Tensor, dim: int) -> Tensor:
        """View what the units own along dimension `dim` as (blocks, units, places a unit)."""
        start, inner = self.span()
        own = tensor.narrow(1, start, inner) if dim == 1 else tensor
        return own.unflatten(dim, (own.shape[dim] // inner, self.units, inner // self.units))


def prune(denoiser: nn.Module, rate: float, mask_only: bool, method: str, units: Tuple[str, ...],
          plan: Callable[[List[Group], float], Plan]) -> Pruned:
    """Remove or mask what `plan` chooses among the denoiser's units; what the removing methods share.

    Raises UserError for a rate outside [0, 1) and for a denoiser without such units.
    """
    if not 0 <= rate < 1:
        raise UserError(f"a pruning rate is a number from 0 up to, but not, 1; got {rate}")
    groups, left_out = survey(denoiser, *units)
    if not groups:
        reasons = "".join(f"; {name}: {why}" for name, why in list(left_out.items())[:3])
        raise UserError(f"{type(denoiser).__name__} has no {' or '.join(units)} that {method} could remove{reasons}")
    kept = plan(groups, rate)
    total = sum(group.units for group in groups)
    taken = sum(group.units - len(kept[group.name]) for group in groups if group.name in kept)
    apply(denoiser, kept, mask_only)
    return Pruned(METHODS[method].unit, total, round(rate * total), taken, left_out)


def survey(denoiser: nn.Module, *units: str) -> Tuple[List[Group], Dict[str, str]]:
    """The groups of these units, in module order, and the modules left out: {name: why}.

    Left out are modules of a known class that are put together in a way for
    which removing would not be exact, layers that are not plain (adapters to
    be merged first, quantised weights, weights shared between layers), and
    modules of classes that KINDS does not know and that sound like units.
    """
    groups, left_out, known, seen = [], {}, [], set()
    owners = Counter(id(p) for module in denoiser.modules() for p in module._parameters.values() if p is not None)
    for name, module in denoiser.named_modules():
        for kind in KINDS:
            if kind.unit not in units or type(module) is not kind.module or not kind.units(module):
                continue
            group = Group(f"{name}.{kind.unit}", module, kind, kind.units(module), kind.norm_groups(module))
            layers = dict(module.named_modules())
            own = {(kind.unit, id(layers[path])) for path in kind.rows if path in layers}
            if own & seen:  # an attention of whose heads the block around it takes care
                continue
            seen |= own
            why = kind.obstacle(module) or layer_obstacle(group, owners)
            known.append(module)
            if why:
                left_out[name] = why
            else:
                groups.append(group)
    left_out.update(unknown(denoiser, units, known))
    return groups, left_out


def unknown(denoiser: nn.Module, units: Tuple[str, ...], known: List[nn.Module]) -> Dict[str, str]:
    """Innermost modules named as those are that hold such units, but of a class that KINDS does not know."""
    covered = {id(part) for module in known for part in module.modules()}
    pattern = "|".join(SOUNDS_LIKE[unit] for unit in units)
    names = {}
    for name, module in denoiser.named_modules():
        if (re.search(pattern, type(module).__name__, re.IGNORECASE) and not isinstance(module, HeadlessAttention)
                and any(True for _ in module.parameters())
                and not any(id(part) in covered for part in module.modules())):
            names[name] = f"its class {type(module).__name__} is not known"
    return {name: why for name, why in names.items() if not any(other.startswith(f"{name}.") for other in names)}


def layer_obstacle(group: Group, owners: Dict[int, int]) -> str:
    """Why a layer of this group cannot be sliced; "" if all can. owners: {id of a parameter: layers that hold it}."""
    kind, layers = group.kind, dict(group.module.named_modules())
    for path in kind.rows + kind.columns:
        if path in layers and type(layers[path]) not in SIZES:
            return f"its {path} is a {type(layers[path]).__name__}"
    names = {id(layer): path for path, layer in layers.items()}
    for layer, _ in group.layers():
        sizes = SIZES.get(type(layer))
        if sizes is None:
            return f"its {names[id(layer)]} is a {type(layer).__name__}"
        size = getattr(layer, sizes[0])
        if "weight" not in layer._parameters or layer.weight.shape[0] != (size[0] if isinstance(size, tuple) else size):
            return f"its {names[id(layer)]} has no plain weight"
        if any(owners[id(p)] > 1 for p in layer.parameters()):
            return f"its {names[id(layer)]} shares its weights with another layer"
    return ""


def score(group: Group) -> Tensor:
    """Root mean square of each unit's weights (biases and norms not counted): (units,), float32, on the CPU.

    The L2 norm over the root of the number of weights: within a module, where
    all units own the same number, the order is that of the L2 norm.
    """
    squares, count = torch.zeros(group.units), 0
    for layer, dim in group.layers(scored=True):
        weight = group.by_unit(layer.weight.detach(), dim)
        others = [d for d in range(weight.dim()) if d != dim + 1]
        wide = torch.promote_types(weight.dtype, torch.float32)
        squares += torch.linalg.vector_norm(weight, dim=others, dtype=wide).float().cpu() ** 2
        count += weight.numel() // group.units
    return (squares / count).sqrt()


@torch.no_grad()
def mask(group: Group, keep: List[int]) -> None:
    """Zero, in place, all that the other units own; shapes stay."""
    drop = sorted(set(range(group.units)) - set(keep))
    for layer, dim in group.layers():
        index = torch.tensor(drop, dtype=torch.long, device=layer.weight.device)
        group.by_unit(layer.weight, dim).index_fill_(dim + 1, index, 0)
        if dim == 0 and getattr(layer, "bias", None) is not None:
            group.by_unit(layer.bias, 0).index_fill_(1, index, 0)


@torch.no_grad()
def remove(group: Group, keep: List[int]) -> None:
    """Slice the module's layers down to the units in `keep` (at least one); works on the meta device too."""
    start, inner = group.span()

    def sliced(parameter: nn.Parameter, dim: int) -> nn.Parameter:
        index = torch.tensor(keep, dtype=torch.long, device=parameter.device)
        kept = group.by_unit(parameter, dim).index_select(dim + 1, index).flatten(dim, dim + 2)
        if dim == 1 and inner < parameter.shape[1]:  # the columns of others stay as they are
            kept = torch.cat([parameter[:, :start], kept, parameter[:, start + inner:]], 1)
        return nn.Parameter(kept, requires_grad=parameter.requires_grad)

    changes = []  # all sliced before any is replaced, as by_unit reads the module's inner width
    for layer, dim in group.layers():
        bias = getattr(layer, "bias", None)
        changes.append((layer, dim, sliced(layer.weight, dim),
                        bias if dim == 1 or bias is None else sliced(bias, 0)))
    for layer, dim, weight, bias in changes:
        layer.weight = weight
        if bias is not None:
            layer.bias = bias
        name, size = SIZES[type(layer)][dim], weight.shape[dim]
        setattr(layer, name, (size,) if isinstance(getattr(layer, name), tuple) else size)
    group.kind.shrink(group.module, group.units, len(keep))


def replace(denoiser: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` stands."""
    for parent in denoiser.modules():
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new.train(old.training)


def apply(denoiser: nn.Module, plan: Plan, mask_only: bool = False) -> None:
    """Keep just the units in `plan`, {group name: indices}; all of it is checked before anything changes.

    What is removed is noted in `denoiser.removals`, a list of plans: applied in turn to a dense denoiser
    they give one of the same shapes.
    """
    if not plan:
        return
    groups = {group.name: group for group in survey(denoiser, *(kind.unit for kind in KINDS))[0]}
    for name, keep in plan.items():
        if name not in groups:
            raise UserError(f"{type(denoiser).__name__} has no {name} to take units out of")
        check_kept(groups[name], keep)
    for name, keep in plan.items():
        group = groups[name]
        if mask_only:
            mask(group, keep)
        elif keep:
            remove(group, keep)
        else:
            replace(denoiser, group.module, group.kind.empty(group.module))
    if not mask_only:
        denoiser.removals = [*getattr(denoiser, "removals", []), plan]


def check_kept(group: Group, keep: List[int]) -> None:
    """Raise a UserError unless `keep` are indices of units, ascending, as many from each norm group."""
    ascending = all(isinstance(unit, int) for unit in keep)
    ascending = ascending and all(a < b for a, b in zip([-1] + keep, keep + [group.units]))
    share = group.units // group.norm_groups
    counts = Counter(unit // share for unit in keep) if ascending else {}
    if not ascending or not (keep or group.kind.empty):
        raise UserError(f"{group.name}: units kept must be ascending indices below {group.units}")
    if keep and (len(counts) != group.norm_groups or len(set(counts.values())) != 1):
        raise UserError(f"{group.name}: as many channels must be kept in each of the {group.norm_groups} norm groups")
