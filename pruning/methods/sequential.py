"""Re-fit in order: each layer learns to give its dense outputs from the inputs that reach it in the pruned denoiser.

A re-fit on dense inputs (refit.py) does not know that the layers before have changed. Here some recorded calls go
through the pruned denoiser once. Just before a layer runs, it is re-fitted on its present inputs x' to the dense
outputs y of the same places. So every layer corrects what the layers before it have left over.

If a layer's output is added to a residual stream, y can also hold what the pruned stream lacks there: the dense stream
minus the pruned one. Transformers like SD3 and Flux multiply the output by a gate g first, which differs between
channels and latents; then g · w x' is to give what is missing. RESIDUALS names such layers.

An expert among which tokens are shared out gets other tokens in the pruned denoiser than in the dense one, so no place
has a dense output to learn from. Then only what the dense inputs say counts.
"""
from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, NamedTuple, Optional, Sequence, Set, Tuple

import torch
from torch import Tensor, nn

from pruning import UserError
from pruning.methods import probes, refit
from pruning.methods.calibration import Calibration, Call, answer, latent_rows
from pruning.methods.moments import Moments, as_rows, hooked, input_rows, output_places, seed_of, some, watched, wide
from pruning.methods.zeroing import restore_zeros

CALLS = 8  # recorded calls that go through the denoiser together
LATENTS = 128  # latents in these calls, at most
ROWS = 6_000  # places of a layer, at most
PRIOR = 0.1  # ρ: the calls are fewer than those of H


class Stream(NamedTuple):
    """The residual stream to which a layer's output is added, as it is or times a gate."""

    source: str  # the part of the block whose input is the stream; "": the block itself
    gate: Optional[Tuple[str, int]] = None  # a part, and the place in its outputs of the gate, (batch, channels)


_UNGATED = {"attn1.to_out.0": Stream("norm1"), "attn2.to_out.0": Stream("norm2"), "ff.net.2": Stream("norm3")}
_JOINT = {"attn.to_out.0": Stream("norm1", ("norm1", 1)), "ff.net.2": Stream("norm2", ("norm1", 4)),
          "attn.to_add_out": Stream("norm1_context", ("norm1_context", 1)),
          "ff_context.net.2": Stream("norm2_context", ("norm1_context", 4))}
_WITH_SINGLE_BLOCKS = ("Flux", "Bria", "BriaFibo", "Chroma", "HunyuanImage", "HunyuanVideo", "LongCatImage",
                       "OvisImage")
# Classes of blocks -> the layers in them whose output is added to a known stream.
RESIDUALS = {
    "BasicTransformerBlock": _UNGATED,
    "ResnetBlock2D": {"conv2": Stream("")},
    "JointTransformerBlock": _JOINT,
    "HunyuanVideo15TransformerBlock": _JOINT,
    **{f"{family}TransformerBlock": _JOINT for family in _WITH_SINGLE_BLOCKS},
    **{f"{family}SingleTransformerBlock": {"proj_out": Stream("norm", ("norm", 1))} for family in _WITH_SINGLE_BLOCKS},
}

# name, layer, x' (groups, n, d), y (groups, n, rows), g like y, None if it is 1
Solve = Callable[[str, nn.Module, Tensor, Tensor, Optional[Tensor]], None]


class Aims(NamedTuple):
    """What the layers of the dense denoiser give for some calls."""

    arguments: Dict[str, Any]  # of the calls as one batch
    outputs: Dict[str, Tensor]  # name -> (groups, n, rows): g · output of a layer without bias + its stream; of a norm
    latents: int  # in these calls
    rows: int  # the most places of a layer
    residual: bool  # whether streams are in the outputs


@torch.no_grad()
def dense_outputs(denoiser: nn.Module, layers: Dict[str, nn.Module], calibration: Calibration,
                  norms: Optional[Dict[str, nn.Module]] = None, residual: bool = False, calls: int = CALLS,
                  latents: int = LATENTS) -> Aims:
    """Return what layers and norms give for some calls. All outputs together fit calibration.memory.

    If the device has no memory for so many latents together, half as many are taken, and so on.
    """
    norms = norms or {}
    chosen = probes.probed_calls(calibration.calls, calls, lean=1.0)
    widths = sum(len(module.weight) for module in (*layers.values(), *norms.values()))
    rows = max(1, min(ROWS, calibration.memory // (4 * max(widths, 1))))
    while True:
        arguments, count = one_batch(chosen, latents, calibration.rows)
        aims = Aims(arguments, {}, count, rows, residual)
        try:
            _note_outputs(denoiser, layers, norms, aims, calibration.seed)
            return aims
        except torch.cuda.OutOfMemoryError:
            if count == 1:
                raise UserError("the device has no memory for a denoiser call of one latent; use --offload "
                                "sequential") from None
            latents = count // 2


def _note_outputs(denoiser, layers, norms, aims: Aims, seed: int) -> None:
    def note(name, layer, x, stream, gate):
        if name not in aims.outputs:  # of several calls of a layer, the first counts
            places = _places(name, output_places(layer, x), aims.rows, seed)
            y = input_rows(layer, x, places) @ wide(as_rows(layer)).transpose(1, 2)
            y = y[:, :0] if _some_tokens(x, aims) else y
            if gate is not None:
                y = y * _at_places(gate, places)
            aims.outputs[name] = (y if stream is None else y + _at_places(stream, places)).cpu()

    def note_norm(name, output):
        if name not in aims.outputs:
            aims.outputs[name] = _at_places(output, _norm_places(name, output, aims.rows, seed)).cpu()

    with _watched(denoiser, layers, aims.residual, note), _norms_watched(norms, note_norm):
        answer(denoiser, aims.arguments)


@torch.no_grad()
def in_order(denoiser: nn.Module, layers: Dict[str, nn.Module], aims: Aims, solve: Solve, calibration: Calibration,
             norms: Optional[Dict[str, nn.Module]] = None) -> None:
    """Send the calls of `aims` through the denoiser, and just before a layer runs, call solve(name, layer, x', y, g).

    x': the layer's inputs at the places of y, (groups, n, d). y: what its output without its bias, times g, is to give
    there, (groups, n, rows). norms: scale and shift are re-fitted, channel by channel, to what `aims` has of them.
    Raises UserError if a layer's present input is not finite.
    """
    waiting = dict(aims.outputs)

    def note(name, layer, x, stream, gate):
        if name not in waiting:
            return
        places = _places(name, output_places(layer, x), aims.rows, calibration.seed)
        some_tokens, x, y = _some_tokens(x, aims), input_rows(layer, x, places), waiting.pop(name).to(x.device)
        if not torch.isfinite(x).all():
            raise UserError(f"the input of {name} is not finite after pruning; use --dtype float32 or a lower rate")
        if some_tokens or not y.shape[1]:
            x, y = x.new_zeros(1, 1, x.shape[2]), y.new_zeros(1, 1, y.shape[2])  # from which nothing is learnt
        solve(name, layer, x, y if stream is None else y - _at_places(stream, places),
              None if gate is None else _at_places(gate, places))

    def note_norm(name, output):
        if name not in waiting:
            return None
        y = waiting.pop(name).to(output.device)
        x = _at_places(output, _norm_places(name, output, aims.rows, calibration.seed))
        return refit.refit_norm(norms[name], output, x[0], y[0])

    with _watched(denoiser, layers, aims.residual, note), _norms_watched(norms or {}, note_norm):
        answer(denoiser, aims.arguments)


def refit_in_order(denoiser: nn.Module, layers: Dict[str, nn.Module], aims: Aims, gathered: Moments,
                   calibration: Calibration) -> None:
    """Re-fit the weights of the layers that are not zero, in place, in the order in which the layers run.

    With w1 the weight that a layer has and H = E[x xᵀ] of its dense inputs, the new weight w has the zeros of w1 and
    the least E|w x' − y|² + ρ (w − w1) H (w − w1)ᵀ + λ |w − w1|². aims, gathered: of the dense denoiser.
    """
    def solve(name, layer, x, y, _gate):
        x, y, weight, (dense, _) = x.float(), y.float(), as_rows(layer).float(), gathered.of(name, x.device)
        target = y.transpose(1, 2) @ x / x.shape[1] + PRIOR * weight @ dense
        matrix = x.transpose(1, 2) @ x / x.shape[1]
        damping = refit.add_damping(matrix.add_(dense, alpha=PRIOR))
        kept = weight != 0
        weight = refit.solve_rows(weight, kept, matrix, target + damping * weight)
        layer.weight.copy_(weight.reshape(layer.weight.shape))
        restore_zeros({name: layer.weight}, {name: ~kept.reshape(layer.weight.shape)})

    in_order(denoiser, layers, aims, solve, calibration)


# ---- places of layers, streams and norms

def _places(name: str, count: int, most: int, seed: int) -> Tensor:
    """Return some places below `count`, the same for the same name and count."""
    return some(count, most, torch.Generator().manual_seed(seed_of(seed, "in order", name)))


def _some_tokens(x: Tensor, aims: Aims) -> bool:
    """Return whether a layer is called with a list of tokens that has no row a latent."""
    return x.dim() == 2 and len(x) != aims.latents


def _norm_places(name: str, output: Tensor, most: int, seed: int) -> Tensor:
    return _places(name, output.numel() // output.shape[1], most, seed)


def _at_places(values: Tensor, places: Tensor) -> Tensor:
    """Return values, (batch, ..., channels) or an image, at some places, (1, n, channels)."""
    rows = values.movedim(1, -1) if values.dim() == 4 else values
    return wide(rows.flatten(0, -2)[places.to(rows.device)])[None]


@contextmanager
def _norms_watched(norms: Dict[str, nn.Module], note: Callable[[str, Tensor], Optional[Tensor]]) -> Iterator[None]:
    """Inside the block, call note(name, output) when a norm has run; what it returns takes the output's place."""
    with hooked(norm.register_forward_hook(lambda module, inputs, output, name=name: note(name, output))
                for name, norm in norms.items()):
        yield


@contextmanager
def _watched(denoiser: nn.Module, layers: Dict[str, nn.Module], residual: bool, note: Callable) -> Iterator[None]:
    """Inside the block, call note(name, layer, input, stream, gate) whenever one of the layers is called.

    stream: the residual stream to which the layer's output is added, of the shape of the output; None if it is not
    asked for or not known. gate: what the output is multiplied by first, of the same shape; None if by nothing.
    """
    known = streams_of(denoiser, layers) if residual else {}
    streams: Dict[nn.Module, Tensor] = {}
    gates: Dict[nn.Module, tuple] = {}

    def keep_stream(module, inputs):
        streams[module] = inputs[0]

    def keep_gate(module, _inputs, output):
        gates[module] = output

    def note_layer(name, layer, x):
        stream = gate = None
        if name in known:
            block, row = known[name]
            stream = streams.pop(block.get_submodule(row.source))
            if row.gate:
                part, place = row.gate
                gate = gates[block.get_submodule(part)][place][:, None].expand_as(stream)
            shortcut = getattr(block, "conv_shortcut", None)
            stream = stream if shortcut is None else shortcut(stream)
        note(name, layer, x, stream, gate)

    sources = {block.get_submodule(row.source) for block, row in known.values()}
    gating = {block.get_submodule(row.gate[0]) for block, row in known.values() if row.gate}
    with hooked(source.register_forward_pre_hook(keep_stream) for source in sources), \
            hooked(part.register_forward_hook(keep_gate) for part in gating), watched(layers, note_layer):
        yield


def streams_of(denoiser: nn.Module, layers: Dict[str, nn.Module]) -> Dict[str, Tuple[nn.Module, Stream]]:
    """Return the block and the stream of those layers for which RESIDUALS knows it, by the name of the weight."""
    found = {}
    for name, block in denoiser.named_modules():
        for path, row in RESIDUALS.get(type(block).__name__, {}).items():
            weight = f"{name}.{path}.weight".lstrip(".")
            if (weight in layers and getattr(block, row.source or "conv2", None) is not None
                    and getattr(block, "norm_type", "layer_norm") == "layer_norm"  # others have gates within
                    and not getattr(block, "up", False) and not getattr(block, "down", False)):  # sizes differ
                found[weight] = (block, row)
    return found


# ---- calls as one batch

def one_batch(calls: Sequence[Call], most: int = LATENTS, rows: Optional[Set[tuple]] = None
              ) -> Tuple[Dict[str, Any], int]:
    """Return the arguments of several calls as those of one call on at most `most` of their latents, and how many.

    As many are taken of each call. Tensors with a row, and lists with an item, a latent follow one another, and a time
    that holds for a whole call becomes one a latent. Calls of another batch size than the first, and calls whose other
    arguments differ from the first's, are left out.

    rows: where these tensors and lists are, as Calibration.rows says. Without them, all that have as many rows as there
    are latents are taken for such.
    """
    first, latents = calls[0][0], len(calls[0][1])
    rows = latent_rows(first, latents) if rows is None else rows
    alike = [arguments for arguments, output in calls if len(output) == latents and _joins(first, arguments, rows)]
    alike = alike[:max(1, most)]
    stride = -(-latents * len(alike) // max(1, most))  # strides take of both halves of a guided call
    return _join(alike, latents, stride, rows), len(range(0, latents, stride)) * len(alike)


def _is_time(value: Any, place: tuple) -> bool:
    return isinstance(value, Tensor) and place[-1:] == ("timestep",)


def _joins(first: Any, other: Any, rows: Set[tuple], place: tuple = ()) -> bool:
    """Return whether two arguments can be those of one call: of equal shape if they have a row a latent, else equal."""
    if isinstance(first, dict):
        return isinstance(other, dict) and first.keys() == other.keys() and all(
            _joins(first[key], other[key], rows, (*place, key)) for key in first)
    if isinstance(first, (list, tuple)):
        return isinstance(other, (list, tuple)) and len(first) == len(other) and (place in rows or all(
            _joins(one, another, rows, (*place, key)) for key, (one, another) in enumerate(zip(first, other))))
    if isinstance(first, Tensor):
        return isinstance(other, Tensor) and first.shape == other.shape and (
            place in rows or _is_time(first, place) or torch.equal(first, other))
    return first == other


def _join(values: list, latents: int, stride: int, rows: Set[tuple], place: tuple = ()) -> Any:
    """Return the arguments of calls that _joins approves as one, every `stride`-th latent of each."""
    first = values[0]
    if isinstance(first, dict):
        return {key: _join([value[key] for value in values], latents, stride, rows, (*place, key)) for key in first}
    if isinstance(first, list) and place in rows:
        return [item for value in values for item in value[::stride]]
    if isinstance(first, (list, tuple)):
        return type(first)(_join(list(each), latents, stride, rows, (*place, key))
                           for key, each in enumerate(zip(*values)))
    if _is_time(first, place):
        return torch.cat([value.expand(latents)[::stride] for value in values])
    return torch.cat([value[::stride] for value in values]) if place in rows else first
