"""KINDS: the modules of diffusers that units (heads, neurons, channels) can be taken out of.

A row describes classes of modules by name, not a model: which rows and columns of which layers a unit owns. Scoring,
masking and removing are all read off the row, so the same weights are scored, zeroed and removed. A new kind of module
or unit is a row here and needs no change elsewhere; its removal is exact if a test shows that removed equals masked.
Names need no import, so one table serves all versions of diffusers. Feed-forwards of classes without a row are found
by probing (feedforwards.py).

Removed equals masked up to rounding for every row, with one exception: a query or key norm across heads takes its
statistics over the heads that are left, and a mask leaves zeros in these statistics.
"""
from __future__ import annotations

from functools import partial
from typing import Callable, Dict, NamedTuple, Optional, Tuple

from diffusers.models import normalization
from diffusers.models.attention_processor import AttnAddedKVProcessor
from torch import nn

from pruning.methods.standins import HeadlessAttention, PrunedGroupNorm, PrunedResponseNorm

# Attention processors that treat heads independently between the layers that KINDS names. Without heads, an attention
# of these yields its output bias.
PROCESSORS = {"AttnProcessor", "AttnProcessor2_0", "FusedAttnProcessor2_0", "SlicedAttnProcessor",
              "XFormersAttnProcessor", "AttnProcessorNPU", "SanaAttnProcessor2_0", "SanaLinearAttnProcessor2_0",
              "JointAttnProcessor2_0", "FusedJointAttnProcessor2_0", "XFormersJointAttnProcessor", "FluxAttnProcessor"}
# The same, of attentions that cannot run without heads.
HEADED = {"AllegroAttnProcessor2_0", "AuraFlowAttnProcessor2_0", "BriaAttnProcessor", "BriaFiboAttnProcessor",
          "BriaFibo2AttnProcessor", "CogVideoXAttnProcessor2_0", "CogView4AttnProcessor", "CosmosAttnProcessor2_0",
          "DreamLiteAttnProcessor2_0", "EasyAnimateAttnProcessor2_0", "ErnieImageSingleStreamAttnProcessor",
          "Flux2AttnProcessor", "Flux3AttnProcessor", "GlmImageAttnProcessor", "HeliosAttnProcessor",
          "HiDreamAttnProcessor", "HunyuanAttnProcessor2_0", "HunyuanImageAttnProcessor",
          "HunyuanVideoAttnProcessor2_0", "HunyuanVideo15AttnProcessor2_0", "Ideogram4AttnProcessor",
          "JoyImageAttnProcessor", "Kandinsky5AttnProcessor", "Krea2AttnProcessor", "LongCatImageAttnProcessor",
          "Lumina2AttnProcessor2_0", "MotifVideoAttnProcessor2_0", "MotifVideoCrossAttnProcessor2_0",
          "NucleusMoEAttnProcessor2_0", "OmniGenAttnProcessor2_0", "OvisImageAttnProcessor", "PRXAttnProcessor2_0",
          "QwenDoubleStreamAttnProcessor2_0", "QwenImage21AttnProcessor", "SanaLinearAttnProcessor3_0",
          "SkyReelsV2AttnProcessor", "WanAttnProcessor", "ZSingleStreamAttnProcessor"}
ADDED_KV = {"AttnAddedKVProcessor", "AttnAddedKVProcessor2_0"}
ACTIVATIONS = ("GELU", "ApproximateGELU", "LinearActivation", "GEGLU", "SwiGLU")


# ---- obstacles: why units cannot be taken out of a module; "" if they can

def attention_obstacle(attention: nn.Module, processors=frozenset(PROCESSORS)) -> str:
    """Return why heads cannot be taken out of this attention; "" if they can."""
    processor = type(attention.processor).__name__
    obstacles = {
        f"its processor is {processor}": processor not in processors,
        "it has no output projection": getattr(attention, "to_out", None) is None,
        "its key and value heads are grouped": getattr(attention, "inner_kv_dim", attention.inner_dim)
        != attention.inner_dim,
    }
    return next((why for why, found in obstacles.items() if found), "")


def processor_obstacle(attention: nn.Module, processors=frozenset(HEADED)) -> str:
    """Return why heads, or groups of heads that share a key head, cannot be taken out of this attention."""
    processor = type(attention.processor).__name__
    if processor not in processors:
        return f"its processor is {processor}"
    return "" if key_heads(attention) > 1 else "its only key head must stay"


def one_key_obstacle(attention: nn.Module) -> str:
    """Return why query heads cannot be taken out of an attention whose key head is to stay."""
    processor = type(attention.processor).__name__
    if processor not in HEADED:
        return f"its processor is {processor}"
    return "" if key_heads(attention) == 1 else "it has several key heads"


def single_block_obstacle(block: nn.Module) -> str:
    """Return why heads cannot be taken out of this block; "" if they can."""
    crossed = getattr(block, "cross_attn", None) is not None
    return "its cross-attention writes where its heads do" if crossed else processor_obstacle(block.attn)


def feed_forward_obstacle(feed_forward: nn.Module) -> str:
    """Return why neurons cannot be taken out of this FeedForward; "" if they can."""
    activation = type(feed_forward.net[0]).__name__
    return "" if activation in ACTIVATIONS else f"its activation is {activation}"


def resnet_obstacle(resnet: nn.Module) -> str:
    """Return why inner channels cannot be taken out of this ResnetBlock2D; "" if they can."""
    return "" if getattr(resnet.norm2, "affine", True) else "its second norm has no weights"


# ---- how many units a module has, and where its rows and columns lie

def all_heads(attention: nn.Module) -> int:
    """Return the number of query heads."""
    return getattr(attention, "heads", 0) or attention.num_heads


def key_heads(attention: nn.Module) -> int:
    """Return the number of key heads. Query heads that share one go together."""
    queries, keys = (getattr(getattr(attention, name, None), "out_features", 0) for name in ("to_q", "to_k"))
    return all_heads(attention) * keys // queries if queries and keys else all_heads(attention)


def single_block_heads(block: nn.Module) -> Tuple[int, int]:
    """Return the first input of proj_out that belongs to the heads, and how many do."""
    query = getattr(block.attn, "to_q", None)
    return 0, query.out_features if query is not None else 0


def single_block_neurons(block: nn.Module) -> Tuple[int, int]:
    """Return the first input of proj_out that belongs to the neurons, which follow the heads, and how many do."""
    heads = single_block_heads(block)[1]
    return heads, block.proj_out.in_features - heads


# ---- after layers are sliced: numbers that the module reads from itself, and modules without a unit

def shrink_attention(attention: nn.Module, units: int, kept: int) -> None:
    """Set the widths that an attention and its processors read to those of its sliced layers."""
    for name in ("heads", "num_heads", "kv_heads", "num_kv_heads", "sliceable_head_dim"):
        if hasattr(attention, name):
            setattr(attention, name, getattr(attention, name) * kept // units)
    for name in ("inner_dim", "inner_kv_dim"):
        if hasattr(attention, name):
            setattr(attention, name, getattr(attention, name) * kept // units)


def shrink_queries(attention: nn.Module, units: int, kept: int) -> None:
    """Set the widths of an attention that keeps its only key head."""
    for name in ("heads", "num_heads", "sliceable_head_dim", "inner_dim"):
        if hasattr(attention, name):
            setattr(attention, name, getattr(attention, name) * kept // units)


def shrink_both(block: nn.Module, units: int, kept: int) -> None:
    """Set the widths of two attentions that share an output projection."""
    for attention in (block.attn1, block.attn2):
        shrink_attention(attention, units, kept)


def shrink_added(attention: nn.Module, units: int, kept: int) -> None:
    """Also take the processor that allows heads narrower than the attention's channels."""
    shrink_attention(attention, units, kept)
    attention.set_processor(AttnAddedKVProcessor())


def shrink_omnigen(attention: nn.Module, units: int, kept: int) -> None:
    """Also set the width by which OmniGen's processor joins heads."""
    shrink_attention(attention, units, kept)
    if type(attention.processor).__name__ == "OmniGenAttnProcessor2_0":
        attention.out_dim = attention.inner_dim


def shrink_single_block(block: nn.Module, units: int, kept: int) -> None:
    """Set the widths that the block and its attention read to those of their sliced layers."""
    heads, neurons = single_block_heads(block)[1], single_block_neurons(block)[1]
    if heads:
        shrink_attention(block.attn, block.attn.inner_dim, heads)
    for name in ("mlp_hidden_dim", "mlp_dim"):
        if hasattr(block, name):
            setattr(block, name, neurons)
    if hasattr(block.proj_out, "_tp_packed_row_blocks"):  # by which newer versions of diffusers split it over devices
        block.proj_out._tp_packed_row_blocks = [heads, neurons]


def empty_single_block(block: nn.Module) -> nn.Module:
    """Take all heads out of a block, in place, and return it: its output projection reads the neurons alone."""
    old, (start, neurons) = block.proj_out, single_block_neurons(block)
    block.attn = HeadlessAttention(block.attn).train(block.training)
    old.weight = nn.Parameter(old.weight.detach()[:, start:].clone(), requires_grad=old.weight.requires_grad)
    old.in_features = neurons
    shrink_single_block(block, 0, 0)
    return block


def shrink_parallel_heads(attention: nn.Module, units: int, kept: int) -> None:
    """Set the widths of an attention whose rows and columns lie beside those of neurons."""
    shrink_attention(attention, units, kept)
    note_blocks(attention)


def shrink_parallel_neurons(attention: nn.Module, units: int, kept: int) -> None:
    """Set the number of neurons that lie beside the heads of an attention."""
    attention.mlp_hidden_dim = kept
    note_blocks(attention)


def note_blocks(attention: nn.Module) -> None:
    """Set the numbers by which diffusers splits fused layers over devices."""
    heads, neurons = attention.inner_dim, attention.mlp_hidden_dim
    attention.to_qkv_mlp_proj._tp_packed_col_blocks = [heads] * 3 + [neurons] * attention.mlp_mult_factor
    attention.to_out._tp_packed_row_blocks = [heads, neurons]


def shrink_depthwise(conv: nn.Module, units: int, kept: int) -> None:
    """Give a depthwise convolution one group a channel."""
    conv.conv_depth.groups = conv.conv_depth.in_channels = conv.conv_depth.out_channels


def shrink_resnet(resnet: nn.Module, units: int, kept: int) -> None:
    """Let the second norm count the removed inner channels as zeros. The widths of input and output stay."""
    old = resnet.norm2
    dense_channels = getattr(old, "dense_channels", units)
    resnet.norm2 = PrunedGroupNorm(old.num_groups, kept, dense_channels, old.eps).train(old.training)
    resnet.norm2.weight, resnet.norm2.bias = old.weight, old.bias


def shrink_response(block: nn.Module, units: int, kept: int, norm: str) -> None:
    """Let the norm at this path count the removed neurons as zeros."""
    parent, _, own = norm.rpartition(".")
    old = block.get_submodule(norm)
    new = PrunedResponseNorm(old, getattr(old, "dense_channels", units)).train(old.training)
    block.get_submodule(parent)._modules[own] = new


class Kind(NamedTuple):
    """Classes of modules that units can be taken out of. Layers are paths in the module; absent layers are skipped.

    A unit owns inner width / units adjacent places of the module's inner width, which is that of the first layer of
    `columns`. A layer with n times as many rows (gate and value, scale and shift, fused q, k and v) has n such blocks
    of rows. A layer with fewer (key heads that query heads share) is shared out evenly among the units.
    """

    unit: str  # its name in plans and in what a method asks for
    modules: Tuple[str, ...]  # names of the classes; a module of such a class with other layers is another one
    rows: Tuple[str, ...]  # layers some of whose outputs a unit owns
    columns: Tuple[str, ...]  # layers some of whose inputs a unit owns
    units: Callable[[nn.Module], int]  # how many units the module has; 0: none are left
    obstacle: Callable[[nn.Module], str] = lambda module: ""  # why units cannot be taken out; "" if they can
    follows: Tuple[str, ...] = ()  # like rows, but not scored: copies of other layers, and norms of the inner width
    vectors: Tuple[str, ...] = ()  # like follows: paths of parameters that hold numbers of the units and no others
    spans: Dict[str, Callable[[nn.Module], Tuple[int, int]]] = {}  # of layers that not only these units own places of:
    # path -> the first of the rows or columns that belong to the units, and how many do
    norm_groups: Callable[[nn.Module], int] = lambda module: 1  # norm groups, which must lose equally many units
    shrink: Callable[[nn.Module, int, int], None] = lambda module, units, kept: None  # called after slicing
    empty: Optional[Callable[[nn.Module], nn.Module]] = None  # makes the module without units; None: a unit must stay
    lookalikes: str = ""  # pattern of the class names of unknown modules that may have such units; "": none are named

    def fits(self, module: nn.Module) -> bool:
        """Return whether a module is of these classes and has their layers."""
        if type(module).__name__ not in self.modules:
            return False
        layers = dict(module.named_modules())
        return any(path in layers for path in self.rows) and self.columns[0] in layers


QKV = ("to_q", "to_k", "to_v")
ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")
QK_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
BOTH = ("attn1", "attn2")  # self- and cross-attention
SINGLE = ("FluxSingleTransformerBlock", "ChromaSingleTransformerBlock")
OTHER_SINGLE = (
    "BriaSingleTransformerBlock", "BriaFiboSingleTransformerBlock", "HunyuanImageSingleTransformerBlock",
    "HunyuanVideoSingleTransformerBlock", "HunyuanVideoTokenReplaceSingleTransformerBlock",
    "LongCatImageSingleTransformerBlock", "MotifVideoSingleTransformerBlock", "OvisImageSingleTransformerBlock")
ATTENTIONS = (
    "Attention", "AnyFlowAttention", "BriaAttention", "BriaFiboAttention", "BriaFibo2Attention", "CosmosAttention",
    "ErnieImageAttention", "Flux2Attention", "Flux3Attention", "HeliosAttention", "Ideogram4Attention",
    "Krea2Attention", "LTXAttention", "LongCatImageAttention", "MochiAttention", "MotifVideoAttention",
    "MotifVideoCrossAttention", "OvisImageAttention", "QwenImage21Attention", "SkyReelsV2Attention", "WanAttention")
KINDS = (
    Kind("heads", ("Attention", "FluxAttention"), rows=QKV + ADDED_QKV, columns=("to_out.0", "to_add_out"),
         units=all_heads, follows=("to_qkv", "to_kv", "to_added_qkv", *QK_NORMS), obstacle=attention_obstacle,
         shrink=shrink_attention, empty=HeadlessAttention, lookalikes="attn|attention"),
    Kind("heads", ATTENTIONS, rows=(*QKV, "to_gate", *ADDED_QKV), columns=("to_out.0", "to_add_out"), units=key_heads,
         follows=("to_qkv", "to_kv", "to_added_qkv", *QK_NORMS), obstacle=processor_obstacle, shrink=shrink_omnigen),
    Kind("heads", ATTENTIONS, rows=("to_q",), columns=("to_out.0",), units=all_heads, follows=("norm_q",),
         obstacle=one_key_obstacle, shrink=shrink_queries),
    Kind("heads", ("Attention",), rows=(*QKV, "add_k_proj", "add_v_proj"), columns=("to_out.0",), units=key_heads,
         obstacle=partial(processor_obstacle, processors=ADDED_KV), shrink=shrink_added),
    Kind("heads", ("LuminaNextDiTBlock",), rows=tuple(f"{each}.{name}" for each in BOTH for name in QKV),
         columns=("attn2.to_out.0",), units=lambda m: key_heads(m.attn2),
         follows=tuple(f"{each}.{name}" for each in BOTH for name in QK_NORMS), vectors=("gate",), shrink=shrink_both),
    Kind("heads", ("HiDreamAttention",), rows=(*QKV, "to_q_t", "to_k_t", "to_v_t"), columns=("to_out", "to_out_t"),
         units=key_heads, follows=("q_rms_norm", "k_rms_norm", "q_rms_norm_t", "k_rms_norm_t"),
         obstacle=processor_obstacle, shrink=shrink_attention),
    Kind("heads", ("JoyImageAttention",), rows=("img_attn_qkv", "txt_attn_qkv"),
         columns=("img_attn_proj", "txt_attn_proj"), units=all_heads, obstacle=processor_obstacle,
         shrink=shrink_attention),
    Kind("heads", ("Kandinsky5Attention",), rows=("to_query", "to_key", "to_value"), columns=("out_layer",),
         units=all_heads, obstacle=processor_obstacle, shrink=shrink_attention),
    Kind("heads", ("PRXAttention",), rows=("img_qkv_proj", "txt_kv_proj"), columns=("to_out.0",), units=all_heads,
         obstacle=processor_obstacle, shrink=shrink_attention),
    Kind("heads", SINGLE, rows=tuple(f"attn.{name}" for name in QKV), columns=("proj_out",), follows=("attn.to_qkv",),
         units=lambda m: getattr(m.attn, "heads", 0), spans={"proj_out": single_block_heads},
         shrink=shrink_single_block, empty=empty_single_block),
    Kind("heads", OTHER_SINGLE, rows=tuple(f"attn.{name}" for name in QKV), columns=("proj_out",),
         units=lambda m: m.attn.heads, obstacle=single_block_obstacle, spans={"proj_out": single_block_heads},
         shrink=shrink_single_block),
    Kind("heads", ("Flux2ParallelSelfAttention",), rows=("to_qkv_mlp_proj",),
         columns=("to_out",), units=all_heads, shrink=shrink_parallel_heads,
         spans={"to_qkv_mlp_proj": lambda m: (0, 3 * m.inner_dim), "to_out": lambda m: (0, m.inner_dim)}),
    Kind("neurons", ("FeedForward",), rows=("net.0.proj",), columns=("net.2",), units=lambda m: m.net[2].in_features,
         obstacle=feed_forward_obstacle, lookalikes="feed_?forward|ffn|mlp|glu"),
    Kind("neurons", SINGLE + OTHER_SINGLE, rows=("proj_mlp",), columns=("proj_out",),
         units=lambda m: single_block_neurons(m)[1], spans={"proj_out": single_block_neurons},
         shrink=shrink_single_block),
    Kind("neurons", ("Flux2ParallelSelfAttention",), rows=("to_qkv_mlp_proj",),
         columns=("to_out",), units=lambda m: m.mlp_hidden_dim, shrink=shrink_parallel_neurons,
         spans={"to_qkv_mlp_proj": lambda m: (3 * m.inner_dim, m.mlp_mult_factor * m.mlp_hidden_dim),
                "to_out": lambda m: (m.inner_dim, m.mlp_hidden_dim)}),
    Kind("neurons", ("LuminaFeedForward",), rows=("linear_1", "linear_3"), columns=("linear_2",),
         units=lambda m: m.linear_2.in_features),
    Kind("neurons", ("PRXBlock",), rows=("gate_proj", "up_proj"), columns=("down_proj",),
         units=lambda m: m.down_proj.in_features),
    Kind("neurons", ("GLUMBConv", "GLUMBTempConv"), rows=("conv_inverted", "conv_depth"), columns=("conv_point",),
         units=lambda m: m.conv_point.in_channels, shrink=shrink_depthwise),
    Kind("neurons", ("SDCascadeResBlock", "ResBlock"), rows=("channelwise.0",), columns=("channelwise.4",),
         units=lambda m: m.channelwise[4].in_features, vectors=("channelwise.2.gamma", "channelwise.2.beta"),
         shrink=partial(shrink_response, norm="channelwise.2")),
    Kind("neurons", ("ConvNextBlock",), rows=("channelwise_linear_1",), columns=("channelwise_linear_2",),
         units=lambda m: m.channelwise_linear_2.in_features,
         vectors=("channelwise_norm.gamma", "channelwise_norm.beta"),
         shrink=partial(shrink_response, norm="channelwise_norm")),
    Kind("channels", ("ResnetBlock2D",), rows=("conv1", "time_emb_proj"), columns=("conv2",), follows=("norm2",),
         units=lambda m: m.conv2.in_channels, obstacle=resnet_obstacle,
         norm_groups=lambda m: m.norm2.num_groups, shrink=shrink_resnet, lookalikes="res_?net|resblock|convnext"),
)
# Norms of the inner width: their statistics do not count what is gone.
NORMS = (nn.LayerNorm, normalization.RMSNorm, nn.RMSNorm)
# The names by which a layer stores the sizes of its weight's dimensions.
SIZES = {nn.Linear: ("out_features", "in_features"), nn.Conv2d: ("out_channels", "in_channels"),
         nn.GroupNorm: ("num_channels",), PrunedGroupNorm: ("num_channels",), nn.LayerNorm: ("normalized_shape",),
         normalization.RMSNorm: ("dim",), nn.RMSNorm: ("normalized_shape",)}
