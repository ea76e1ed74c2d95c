"""KINDS: the modules of diffusers that units (heads, neurons, channels) can be taken out of.

A row describes a class of modules, not a model: which rows and columns of which layers a unit owns. Scoring, masking
and removing are all read off the row, so the same weights are scored, zeroed and removed. A new kind of module or unit
is a row here and needs no change elsewhere; its removal is exact if a test shows that removed equals masked.

Removed equals masked up to rounding for every row, with one exception: a query or key norm across heads takes its
statistics over the heads that are left, and a mask leaves zeros in these statistics.
"""
from __future__ import annotations

from typing import Callable, NamedTuple, Optional, Tuple

import torch
from diffusers.models import activations, normalization
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.sana_transformer import GLUMBConv
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxSingleTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F

# Attention processors that treat heads independently between the layers that KINDS names.
PROCESSORS = {"AttnProcessor", "AttnProcessor2_0", "FusedAttnProcessor2_0", "SlicedAttnProcessor",
              "XFormersAttnProcessor", "AttnProcessorNPU", "SanaAttnProcessor2_0", "SanaLinearAttnProcessor2_0",
              "JointAttnProcessor2_0", "FusedJointAttnProcessor2_0", "XFormersJointAttnProcessor", "FluxAttnProcessor"}
ACTIVATIONS = (activations.GELU, activations.ApproximateGELU, activations.LinearActivation,
               activations.GEGLU, activations.SwiGLU)


class PrunedGroupNorm(nn.GroupNorm):
    """GroupNorm in whose statistics the removed channels still count, as zeros.

    Its output for the kept channels is that of the dense norm with the removed channels zeroed. With s = kept / dense
    channels and the kept channels' mean m and (biased) variance v of a norm group, the dense group's mean is s m and
    its variance is s (v + (1 - s) m^2). Input and output (batch, channels, ...); statistics in float32 at least.
    """

    def __init__(self, num_groups: int, num_channels: int, dense_channels: int, eps: float):
        super().__init__(num_groups, num_channels, eps, device="meta")
        self.dense_channels = dense_channels

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (batch, channels, ...)."""
        return self.of_padded(x) if x.is_cuda else self.of_statistics(x)

    def of_padded(self, x: Tensor) -> Tensor:
        """Normalize with zeros in place of the removed channels: four kernels, as a GPU waits for each one."""
        batch, kept = len(x), self.num_channels // self.num_groups
        dense = self.dense_channels // self.num_groups
        padded = F.pad(x.reshape(batch, self.num_groups, kept, -1), (0, 0, 0, dense - kept)).flatten(1, 2)
        normed = F.group_norm(padded, self.num_groups, eps=self.eps).view(batch, self.num_groups, dense, -1)
        weight, bias = (each.view(1, self.num_groups, kept, 1) for each in (self.weight, self.bias))
        return torch.addcmul(bias, normed[:, :, :kept], weight).reshape(x.shape).to(x.dtype)

    def of_statistics(self, x: Tensor) -> Tensor:
        """Normalize and correct the statistics: most of the work is in the kept channels alone, as a CPU likes it."""
        h = x if x.dtype == torch.float64 else x.float()
        if not (h.device.type == "cpu" and h.dim() == 4 and h.is_contiguous(memory_format=torch.channels_last)):
            h = h.contiguous()
        batch, channels = h.shape[:2]
        # The native kernel also returns its statistics, and on the CPU it is up to ten times faster than var_mean.
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
        """Return GroupNorm's text and the dense width."""
        return f"{super().extra_repr()}, dense_channels={self.dense_channels}"


class HeadlessAttention(nn.Module):
    """The output of an attention whose heads are all zero: its output bias, and its residual if it has one.

    Input (batch, tokens, channels) or (batch, channels, height, width), as for the attention. A joint attention
    returns a second output for the other stream, with that stream's bias. An attention without an output projection
    returns no channels.
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
        """Take the attention's arguments; only shapes count, and the values of hidden_states for the residual."""
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


# ---- obstacles: why units cannot be taken out of a module; "" if they can

def attention_obstacle(attention: nn.Module) -> str:
    """Return why heads cannot be taken out of this attention; "" if they can."""
    processor = type(attention.processor).__name__
    obstacles = {
        f"its processor is {processor}": processor not in PROCESSORS,
        "it has no output projection": getattr(attention, "to_out", None) is None,
        "its key and value heads are grouped": getattr(attention, "inner_kv_dim", attention.inner_dim)
        != attention.inner_dim,
    }
    return next((why for why, found in obstacles.items() if found), "")


def feed_forward_obstacle(feed_forward: FeedForward) -> str:
    """Return why neurons cannot be taken out of this FeedForward; "" if they can."""
    activation = type(feed_forward.net[0])
    return "" if activation in ACTIVATIONS else f"its activation is {activation.__name__}"


def resnet_obstacle(resnet: ResnetBlock2D) -> str:
    """Return why inner channels cannot be taken out of this ResnetBlock2D; "" if they can."""
    return "" if getattr(resnet.norm2, "affine", True) else "its second norm has no weights"


# ---- after layers are sliced: numbers that the module reads from itself, and modules without a unit

def shrink_attention(attention: nn.Module, units: int, kept: int) -> None:
    """Set the widths that an attention and its processors read to those of its sliced layers."""
    inner = attention.to_q.out_features
    for name, value in (("heads", kept), ("sliceable_head_dim", kept), ("inner_dim", inner), ("inner_kv_dim", inner)):
        if hasattr(attention, name):
            setattr(attention, name, value)


def single_block_heads(block: FluxSingleTransformerBlock) -> Tuple[int, int]:
    """Return the first input of proj_out that belongs to the heads, and how many do."""
    return 0, block.proj_out.in_features - block.proj_mlp.out_features


def single_block_neurons(block: FluxSingleTransformerBlock) -> Tuple[int, int]:
    """Return the first input of proj_out that belongs to the neurons, which follow the heads, and how many do."""
    return block.proj_out.in_features - block.proj_mlp.out_features, block.proj_mlp.out_features


def shrink_single_block(block: FluxSingleTransformerBlock, units: int, kept: int) -> None:
    """Set the widths that the block and its attention read to those of their sliced layers."""
    _, heads_inner = single_block_heads(block)
    if heads_inner:
        shrink_attention(block.attn, units, heads_inner // block.attn.head_dim)
    block.mlp_hidden_dim = block.proj_mlp.out_features
    if hasattr(block.proj_out, "_tp_packed_row_blocks"):  # by which newer versions of diffusers split it over devices
        block.proj_out._tp_packed_row_blocks = [heads_inner, block.mlp_hidden_dim]


def empty_single_block(block: FluxSingleTransformerBlock) -> FluxSingleTransformerBlock:
    """Take all heads out of a block, in place, and return it: its output projection reads the neurons alone."""
    old, (start, neurons) = block.proj_out, single_block_neurons(block)
    block.attn = HeadlessAttention(block.attn).train(block.training)
    old.weight = nn.Parameter(old.weight.detach()[:, start:].clone(), requires_grad=old.weight.requires_grad)
    old.in_features = neurons
    shrink_single_block(block, 0, 0)
    return block


def shrink_depthwise(conv: GLUMBConv, units: int, kept: int) -> None:
    """Give a depthwise convolution one group a channel."""
    conv.conv_depth.groups = conv.conv_depth.in_channels = conv.conv_depth.out_channels


def shrink_resnet(resnet: ResnetBlock2D, units: int, kept: int) -> None:
    """Let the second norm count the removed inner channels as zeros. The widths of input and output stay."""
    old = resnet.norm2
    dense_channels = getattr(old, "dense_channels", units)
    resnet.norm2 = PrunedGroupNorm(old.num_groups, kept, dense_channels, old.eps).train(old.training)
    resnet.norm2.weight, resnet.norm2.bias = old.weight, old.bias


class Kind(NamedTuple):
    """A class of modules that units can be taken out of. Layers are paths in the module; absent layers are skipped.

    A unit owns inner width / units adjacent places of the module's inner width. A layer with n times as many rows
    (gate and value, scale and shift, fused q, k and v) has n such blocks of rows.
    """

    unit: str  # its name in plans and in what a method asks for
    module: type  # the exact class
    rows: Tuple[str, ...]  # layers some of whose outputs a unit owns
    columns: Tuple[str, ...]  # layers some of whose inputs a unit owns
    units: Callable[[nn.Module], int]  # how many units the module has; 0: none are left
    obstacle: Callable[[nn.Module], str] = lambda module: ""  # why units cannot be taken out; "" if they can
    follows: Tuple[str, ...] = ()  # like rows, but not scored: copies of other layers, and norms of the inner width
    span: Optional[Callable[[nn.Module], Tuple[int, int]]] = None  # the first of the columns that belong to the units,
    # and how many do, which is the inner width; None: all columns of the first layer of `columns`
    norm_groups: Callable[[nn.Module], int] = lambda module: 1  # norm groups, which must lose equally many units
    shrink: Callable[[nn.Module, int, int], None] = lambda module, units, kept: None  # called after slicing
    empty: Optional[Callable[[nn.Module], nn.Module]] = None  # makes the module without units; None: a unit must stay
    lookalikes: str = ""  # pattern of the class names of unknown modules that may have such units; "": none are named


QKV = ("to_q", "to_k", "to_v")
ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")
QK_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
KINDS = (
    Kind("heads", Attention, rows=QKV + ADDED_QKV, columns=("to_out.0", "to_add_out"), units=lambda m: m.heads,
         follows=("to_qkv", "to_kv", "to_added_qkv", *QK_NORMS), obstacle=attention_obstacle,
         shrink=shrink_attention, empty=HeadlessAttention, lookalikes="attn|attention"),
    Kind("heads", FluxAttention, rows=QKV + ADDED_QKV, columns=("to_out.0", "to_add_out"), units=lambda m: m.heads,
         follows=("to_qkv", "to_added_qkv"), obstacle=attention_obstacle,
         shrink=shrink_attention, empty=HeadlessAttention),
    Kind("heads", FluxSingleTransformerBlock, rows=tuple(f"attn.{name}" for name in QKV), columns=("proj_out",),
         follows=("attn.to_qkv",), units=lambda m: getattr(m.attn, "heads", 0), span=single_block_heads,
         shrink=shrink_single_block, empty=empty_single_block),
    Kind("neurons", FeedForward, rows=("net.0.proj",), columns=("net.2",), units=lambda m: m.net[2].in_features,
         obstacle=feed_forward_obstacle, lookalikes="feed_?forward|ffn|mlp|glu"),
    Kind("neurons", FluxSingleTransformerBlock, rows=("proj_mlp",), columns=("proj_out",),
         units=lambda m: m.proj_mlp.out_features, span=single_block_neurons, shrink=shrink_single_block),
    Kind("neurons", GLUMBConv, rows=("conv_inverted", "conv_depth"), columns=("conv_point",),
         units=lambda m: m.conv_point.in_channels, shrink=shrink_depthwise),
    Kind("channels", ResnetBlock2D, rows=("conv1", "time_emb_proj"), columns=("conv2",), follows=("norm2",),
         units=lambda m: m.conv2.in_channels, obstacle=resnet_obstacle,
         norm_groups=lambda m: m.norm2.num_groups, shrink=shrink_resnet, lookalikes="res_?net|resblock"),
)
# The names by which a layer stores the sizes of its weight's dimensions.
SIZES = {nn.Linear: ("out_features", "in_features"), nn.Conv2d: ("out_channels", "in_channels"),
         nn.GroupNorm: ("num_channels",), PrunedGroupNorm: ("num_channels",), nn.LayerNorm: ("normalized_shape",),
         normalization.RMSNorm: ("dim",)}
NORMS = (nn.LayerNorm, normalization.RMSNorm)  # of the inner width: their statistics do not count what is gone
