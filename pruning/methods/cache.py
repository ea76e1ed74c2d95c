"""Skip the blocks of a transformer in some calls: what a user could do instead of pruning.

diffusers' MagCache decides in which (Ma et al., 2025, arXiv 2506.09045). A skipped call adds to the transformer's
hidden states what all blocks together added in the last whole call. From call to call, what they add changes its
magnitude by a ratio that hardly depends on the caption. So the product of these ratios since the last whole call says
how far a skipped call is off, before any image is drawn: calls are skipped while the sum of these errors is below a
threshold. The same calls are skipped for all images.
"""
from __future__ import annotations

import copy
import inspect
import io
import json
import math
import re
from contextlib import contextmanager, redirect_stdout
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

import numpy as np
from torch import nn

from pruning import UserError
from pruning.methods import METHODS, Pruned
from pruning.models import signature, skeleton
from pruning.models.hub import first_line

RETENTION = 0.2  # share of the calls, the first, that are never skipped; diffusers' default
IN_A_ROW = 3  # most calls that are skipped one after the other, if the rate does not need more; diffusers' default
THRESHOLDS = [float(f"{10 ** (i / 40):.3g}") for i in range(-160, 81)]  # 0.0001 to 100
MANY = 10_000  # calls in a row that are timed, at most


def plan(rate: float, steps: int, magnitudes: Sequence[float]) -> Pruned:
    """Skip round(rate * n) of the n calls of a drawing, one a magnitude, but for one. Rate 0 skips none.

    Finds the fewest calls in a row and the lowest threshold that skip exactly as many. If there is no such threshold,
    none is skipped. magnitudes: those that the function of this name returns.
    """
    total, unit = len(magnitudes), METHODS["cache"].unit
    asked = min(round(rate * total), total - 1)
    for in_a_row in range(IN_A_ROW, total) if asked else ():
        for threshold in THRESHOLDS:
            if skipped(magnitudes, threshold, in_a_row) == asked:
                return Pruned(unit, total, asked, asked, drawing={
                    "threshold": threshold, "max_skip_steps": in_a_row, "retention_ratio": RETENTION,
                    "num_inference_steps": total, "mag_ratios": list(magnitudes)})
    return Pruned(unit, total, asked, 0)


def skipped(magnitudes: Sequence[float], threshold: float, in_a_row: int) -> int:
    """Return how many calls of a drawing MagCache skips. A whole call starts the product and the sum again."""
    first, count = max(1, int(RETENTION * len(magnitudes) + 0.5)), 0
    product, error, run = 1.0, 0.0, 0
    for magnitude in magnitudes[first:]:
        product, run = product * magnitude, run + 1
        error += abs(1 - product)
        if error <= threshold and run <= in_a_row:
            count += 1
        else:
            product, error, run = 1.0, 0.0, 0
    return count


def why_not(found: skeleton.Skeleton, guidance_scale: float) -> str:
    """Return why diffusers cannot skip the blocks of a model in drawings with this guidance scale, "" if it can."""
    denoiser, kind = found.parts[found.denoiser], type(found.pipeline)
    why, call = why_no_blocks(denoiser), inspect.unwrap(kind.__call__)
    if why or not signature.guides_twice(found.pipeline, denoiser, guidance_scale):
        return why
    # Pipelines that guide within one call split its output into chunks.
    apart = inspect.getsource(call).count(f"self.{found.denoiser}(") > 1 and "chunk" not in call.__code__.co_names
    return why_untold(kind) if apart else ""


def why_no_blocks(denoiser: nn.Module) -> str:
    """Return why diffusers cannot skip the blocks of a denoiser, "" if it can. Works on the meta device."""
    import diffusers
    if not hasattr(diffusers, "MagCacheConfig"):
        return f"diffusers {diffusers.__version__} has no MagCache; a newer release has it"
    magcache, kind = f"MagCache of diffusers {diffusers.__version__}", type(denoiser).__name__
    try:
        hooks = hooked(apply(twin(denoiser), {"calibrate": True}))
    except ValueError:
        return f"{magcache} does not know the blocks of {kind}"
    if not hooks:
        return f"{kind} has no list of transformer blocks, which is what diffusers' MagCache skips"
    if len({block for block, _ in hooks}) == 1:
        return f"{kind} has a single block, in which {magcache} does not count the calls that it skips"
    for block, hook in hooks:
        asked = hook._metadata.hidden_states_argument_name
        if asked not in inspect.signature(type(block).forward).parameters:
            return f"{magcache} asks the blocks of {kind} for {asked}, which they do not take"
    return ""


def why_untold(pipeline: type) -> str:
    """Return why diffusers cannot skip blocks if a pipeline class calls its transformer more than once a step.

    "" if the class tells diffusers which of these calls belong together.
    """
    return "" if "cache_context" in inspect.unwrap(pipeline.__call__).__code__.co_names else (
        f"{pipeline.__name__} calls its transformer more than once a step and does not tell diffusers which of these "
        "calls belong together")


def magnitudes(pipeline, denoiser: nn.Module, draws: Sequence[Callable[[], object]]) -> List[float]:
    """Return by what ratio the magnitude of what all blocks add changes from each call of a drawing to the next.

    The mean over the batches, and over the calls with and without the caption if a pipeline makes them one by one.

    draws: each draws a batch of captions with the pipeline, which must hold this denoiser and have drawn in as many
    steps before. Raises UserError if diffusers cannot skip its blocks.
    """
    why, calls = why_no_blocks(denoiser), len(pipeline.scheduler.timesteps)
    found = []
    for draw in () if why else draws:
        try:
            with cached(denoiser, {"calibrate": True, "num_inference_steps": calls}) as ran, \
                    redirect_stdout(io.StringIO()) as printed:  # diffusers prints the ratios, and has no other way
                draw()
        except Exception as error:  # the blocks of some models are called in ways that MagCache does not know
            raise UserError(f"cache is not possible here: diffusers' MagCache fails in {type(denoiser).__name__} "
                            f"({first_line(error)}); leave cache out") from error
        found += re.findall(r"^\[[^A-Z]+\]$", printed.getvalue(), re.MULTILINE)
        if len(ran) != calls:
            why = why_untold(type(pipeline))
    if not why and not (found and all(math.isfinite(ratio) for each in found for ratio in json.loads(
            each.replace("nan", "NaN").replace("inf", "Infinity")))):
        why = "MagCache finds no finite magnitudes in this model"
    if why:
        raise UserError(f"cache is not possible here: {why}; leave cache out")
    return [float(f"{ratio:.6g}") for ratio in np.mean([json.loads(each) for each in found], axis=0)]


@contextmanager
def drawing(denoiser: nn.Module, pruned: Pruned, sampling: Dict[str, Any]) -> Iterator[Dict[str, Any]]:
    """Let a denoiser skip the calls of a plan during the block, which draws a batch. Yields `sampling` as it is.

    Raises UserError if the denoiser has skipped another number.
    """
    if not pruned.taken:
        yield sampling
        return
    with cached(denoiser, pruned.drawing) as ran:
        yield sampling
    if ran.count(False) * pruned.total != pruned.taken * len(ran):
        raise UserError(f"the cache skipped {ran.count(False)} of {len(ran)} calls of a drawing, and the plan was "
                        f"{pruned.taken} of {pruned.total}; if memory ran out, give a smaller --batch_size")


@contextmanager
def cached(denoiser: nn.Module, settings: Dict[str, Any]) -> Iterator[List[bool]]:
    """Apply MagCache during the block. Yields a list that gets for each call of the denoiser whether its blocks ran.

    settings: keyword arguments of diffusers' MagCacheConfig. The denoiser must be one that MagCache knows.
    """
    from diffusers.hooks import HookRegistry

    ran: List[bool] = []

    def note(*_) -> None:
        ran[-1] = True

    first, _ = hooked(apply(denoiser, settings))[0]
    handles = [denoiser.register_forward_pre_hook(lambda *_: ran.append(False)),
               *(part.register_forward_pre_hook(note) for part in first.children())]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()
        for name in hook_names():
            HookRegistry.check_if_exists_or_initialize(denoiser).remove_hook(name, recurse=True)


def apply(denoiser: nn.Module, settings: Dict[str, Any]) -> nn.Module:
    """Apply MagCache to a denoiser, and return the denoiser. settings: keyword arguments of MagCacheConfig."""
    from diffusers import MagCacheConfig
    from diffusers.hooks import HookRegistry, apply_mag_cache
    apply_mag_cache(denoiser, MagCacheConfig(**settings))
    # Pipelines tell the hooks to which prompt a call belongs. An earlier drawing may have noted that there is no hook.
    registry = HookRegistry.check_if_exists_or_initialize(denoiser)
    getattr(registry, "invalidate_child_registries_cache", lambda: None)()  # older releases note nothing
    return denoiser


def hooked(denoiser: nn.Module) -> List[Tuple[nn.Module, Any]]:
    """Return the blocks of a denoiser to which MagCache is applied, each with its hook. The first decides for all."""
    registries = {block: block._diffusers_hook for block in denoiser.modules() if hasattr(block, "_diffusers_hook")}
    return [(block, registry.get_hook(name)) for name in hook_names() for block, registry in registries.items()
            if registry.get_hook(name)]


def hook_names() -> Tuple[str, str]:
    """Return what diffusers calls MagCache's hook of the first block, and those of the others."""
    from diffusers.hooks import mag_cache
    return mag_cache._MAG_CACHE_LEADER_BLOCK_HOOK, mag_cache._MAG_CACHE_BLOCK_HOOK


def twin(denoiser: nn.Module) -> nn.Module:
    """Return a copy of a denoiser that shares its tensors, so that what is applied to one does not change the other."""
    return copy.deepcopy(denoiser, {id(tensor): tensor for tensor in (*denoiser.parameters(), *denoiser.buffers())})


def timed(denoiser: nn.Module, pruned: Pruned, share: float = 1.0) -> Tuple[List[nn.Module], List[float]]:
    """Return a twin that never skips its blocks and one that always does, and the share of the calls of each.

    The first call of the second twin is a whole one. share: of dense's calls that a drawing makes, whole and skipped.
    """
    endless = {"num_inference_steps": MANY, "mag_ratios": [1.0] * MANY, "max_skip_steps": MANY}
    whole = apply(twin(denoiser), {**endless, "threshold": 0.0, "retention_ratio": 1.0})
    short = apply(twin(denoiser), {**endless, "threshold": math.inf, "retention_ratio": 0.0})
    skipped_share = pruned.taken / pruned.total
    return [whole, short], [share * (1 - skipped_share), share * skipped_share]
