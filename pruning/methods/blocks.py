"""Bypass whole blocks, in an order by the error of the final latents without them, and re-fit the others.

Each time the block goes whose absence, beside what is gone already, changes the final latents of a few training
captions least. As these changes mostly grow with what else is gone, a block is only measured again when it comes first
(Minoux, 1978, accelerated greedy). All layers of the other blocks are then re-fitted in order, and where the residual
stream is known, those that write into it make up for what it lacks (sequential).
"""
from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Optional

import torch
from torch import Tensor, nn

from pruning import UserError
from pruning.methods import LayerPruned, Pruned, bypass, moments, sequential, surgery
from pruning.methods import refit as refitting
from pruning.methods.calibration import Calibration, answer
from pruning.methods.moments import as_rows
from pruning.progress import tqdm

UNITS = surgery.UNITS
FEW = 4  # captions whose final latents decide
LOST = 1.0  # error from which nothing of the dense latents is left, and the order of what remains does not matter


class Order(NamedTuple):
    """Blocks in the order in which they go."""

    names: List[str]
    errors: List[float]  # after each: squared change of the final latents, relative to their variance, without re-fit
    alone: Dict[str, float]  # the same if one block alone is gone


def prune(denoiser: nn.Module, rate: float, *, refit: bool, mask_only: bool,
          calibration: Optional[Calibration] = None) -> Pruned:
    """Bypass, or with mask_only zero the last layers of, round(rate * n) of all n blocks, in place.

    refit: whether the other blocks are re-fitted. Raises UserError if the denoiser has no blocks, or if the
    calibration cannot sample.
    """
    if rate == 0:
        return Pruned("blocks", 1, 0, 0)
    found = bypass.find(denoiser, calibration.calls[0][0])
    if not found:
        raise UserError(f"{type(denoiser).__name__} has no blocks that return what they are given plus a change")
    order, reached = order_of(denoiser, found, calibration), bypass.reached(denoiser, found)
    gone = {name: found[name] for name in order.names[:round(rate * len(found))]}
    aims = aims_of(denoiser, calibration) if refit and gone else None
    take_out(denoiser, gone, aims, mask_only, calibration)
    return Pruned("blocks", len(found), len(gone), len(gone), {},
                  {name: LayerPruned(float(name in gone), order.alone[name]) for name in found}, reached)


def order_of(denoiser: nn.Module, found: Dict[str, bypass.Streams], calibration: Calibration) -> Order:
    """Return the order of the blocks, computed once for all rates."""
    names = list(found)

    def compute():
        dense = calibration.latents(denoiser, FEW)
        bar = tqdm(total=len(names), desc="order of blocks", unit="block", leave=False)

        def error(gone: List[str]) -> float:
            with bypass.bypassed(denoiser, {name: found[name] for name in gone}):
                return float((calibration.latents(denoiser, FEW) - dense).square().mean() / dense.var())

        alone = {name: error([name]) for name in names}
        gone, errors, reached, growth, measured = [], [], 0.0, dict(alone), dict.fromkeys(names, 0)
        while growth:
            name = min(growth, key=growth.get)
            if measured[name] < len(gone) and reached < LOST:
                growth[name], measured[name] = error([*gone, name]) - reached, len(gone)
                continue
            reached += growth.pop(name)
            gone.append(name)
            errors.append(reached)
            bar.update()
        bar.close()
        return {"order": torch.tensor([names.index(name) for name in gone]),
                "errors": torch.tensor(errors, dtype=torch.float64),
                "alone": torch.tensor([alone[name] for name in names], dtype=torch.float64)}

    known = calibration.keep("order of blocks", compute)
    return Order([names[place] for place in known["order"].tolist()], known["errors"].tolist(),
                 dict(zip(names, known["alone"].tolist())))


def aims_of(denoiser: nn.Module, calibration: Calibration) -> sequential.Aims:
    """Return what the layers that are re-fitted give in the dense denoiser."""
    return sequential.dense_outputs(denoiser, refitted_layers(denoiser), calibration, residual=True)


def take_out(denoiser: nn.Module, blocks: Dict[str, bypass.Streams], aims: Optional[sequential.Aims], mask_only: bool,
             calibration: Calibration) -> None:
    """Bypass or zero blocks, and re-fit the others if there are aims."""
    if mask_only:
        zero(denoiser, blocks, calibration.calls[0][0])
    else:
        bypass.take_out(denoiser, blocks)
    if aims:
        refit(denoiser, blocks, aims, calibration)


def refit(denoiser: nn.Module, blocks: Dict[str, bypass.Streams], aims: sequential.Aims, calibration: Calibration
          ) -> None:
    """Re-fit all layers of a denoiser that are not in `blocks`, which are bypassed or zeroed, in order.

    Each learns to give its dense outputs y from its present inputs x', and stays near its weight w0:

        E|g (w x' + b) − y|² / E[g²] + ρ E|(w − w0) x' + b|² + λ |w − w0|²   over w and b

    g: the gate between layer and stream, 1 if there is none (sequential).
    """
    def solve(_name: str, layer: nn.Module, x: Tensor, y: Tensor, gate: Optional[Tensor]) -> None:
        x, weight = x[0], moments.wide(as_rows(layer).detach()[0])
        weight, bias = refitting.refit_columns(weight, torch.arange(weight.shape[1], device=x.device), x, y[0],
                                               x.T @ x / len(x), x.mean(0), layer.bias is not None, sequential.PRIOR,
                                               None if gate is None else gate[0])
        layer.weight.copy_(weight.reshape(layer.weight.shape))
        if layer.bias is not None:
            layer.bias.add_(bias)

    layers = {name: layer for name, layer in refitted_layers(denoiser).items()
              if not bypass.inside(name, blocks)}
    sequential.in_order(denoiser, layers, aims, solve, calibration)


@torch.no_grad()
def zero(denoiser: nn.Module, blocks: Dict[str, bypass.Streams], call: Dict[str, Any]) -> None:
    """Zero, in place, the layers of blocks that write into the residual stream; shapes stay.

    Raises UserError if a block still changes its stream in a call with these keyword arguments.
    """
    groups = surgery.find_groups(denoiser, UNITS)[0]
    for name in blocks:
        block = denoiser.get_submodule(name)
        writers = [layer for group in groups if bypass.inside(group.name, [name])
                   for layer in group.column_layers().values()]
        for layer in writers + [layer for layer in [getattr(block, "proj_out", None)] if layer is not None]:
            for parameter in layer.parameters():
                parameter.zero_()

    def check(name):
        def note(block, args, kwargs, output):
            expected = bypass.bypass_of(block, blocks[name])(*args, **kwargs)
            pairs = zip(*(each if isinstance(each, tuple) else (each,) for each in (output, expected)))
            if not all(one is other or torch.allclose(one, other, atol=1e-5) for one, other in pairs):
                raise UserError(f"{name} cannot be zeroed: the layers of {type(block).__name__} that write into its "
                                "stream are not known; leave out --mask_only")
        return note

    with moments.hooked(denoiser.get_submodule(name).register_forward_hook(check(name), with_kwargs=True)
                        for name in blocks):
        answer(denoiser, call)


def refitted_layers(denoiser: nn.Module) -> Dict[str, nn.Module]:
    """Return the layers that are re-fitted, by the name of the weight: all prunable ones but grouped convolutions."""
    return {name: layer for name, layer in moments.prunable_layers(denoiser).items() if len(as_rows(layer)) == 1}
