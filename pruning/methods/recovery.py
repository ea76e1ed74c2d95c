"""Recovery: the weights that are left learn to answer as the dense denoiser does. A step that any method can use.

They learn on latents that the dense denoiser comes to while it draws, and on those that the pruned one itself comes to.
On the former alone it would not learn to find back once it has gone astray, as it does over the steps of a drawing
(Ross et al., 2011). If a call holds both halves of the guided output, they learn this output beside the halves, as the
steps follow it and it magnifies errors in which the halves differ.

The ResNets and spatial transformers of a UNet also learn to give what they give in the dense one: from the sample
alone, a block in the middle hardly learns what it did (Romero et al., 2015; of diffusion models Kim et al., 2023,
BK-SDM). With u and v what a block gives in the pruned and in the dense denoiser, the mean over the blocks of
E[(u − v)²] ÷ Var[v], BLOCKS times, is added to the error of the samples. The blocks of shapes-mmdit gained next to
nothing by this, for half as much time again, so those of transformers do not learn so.
"""
from __future__ import annotations

import hashlib
import math
import random
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pruning import UserError, distributed, whole_file
from pruning.methods import bypass, muon, probes, reckoning
from pruning.methods.calibration import Calibration, Call, answer, match
from pruning.methods.moments import hooked
from pruning.methods.muon import Muon
from pruning.methods.sequential import one_batch
from pruning.methods.zeroing import prunable_weights, restore_zeros
from pruning.progress import status, tqdm
from pruning.records.words import gigabytes

CALLS_PER_STEP = 4
VISIT_STEPS = 50  # after about so many, the denoiser draws anew
LEARNING_RATE = 3e-4  # of AdamW
WARMUP_STEPS = 10
GRADIENT_NORM = 1.0
BLOCKS = 5.0


class Teacher(NamedTuple):
    """The dense denoiser, and the names of the blocks that learn from its own."""

    dense: nn.Module
    blocks: List[str]


def rehearse(denoiser: nn.Module, removes: bool, calibration: Calibration) -> None:
    """Record the calls, and raise UserError if recovery will not fit the device's memory.

    removes: whether units will be removed. The memory that this saves is not known before, so recover_at checks it.
    All processes call this together.
    """
    _ = calibration.calls
    if not removes:
        with training(denoiser, prunable_weights(denoiser), calibration):
            pass


def recover_at(rate: float, denoiser: nn.Module, removed: bool, calibration: Calibration, steps: int) -> None:
    """Recover after pruning to a rate, as `recover` does, with the seed of the rate and a progress bar.

    removed: whether units were removed; else zeros of prunable weights are held. All processes call this together, with
    equal denoisers. Raises UserError if the device's memory does not suffice, and as `recover` does.
    """
    weights = {} if removed else prunable_weights(denoiser)
    with training(denoiser, weights, calibration) as memory, \
            tqdm(total=steps, desc="recovery", unit="step", leave=False, disable=not distributed.is_main) as bar:
        status(memory)
        recover(denoiser, weights, calibration, steps, f"{calibration.seed} {rate!r}", bar)


def recover(denoiser: nn.Module, weights: Dict[str, Tensor], calibration: Calibration, steps: int, seed: str,
            bar: Optional[tqdm] = None) -> None:
    """Train the denoiser for some steps to give the dense denoiser's samples, in place.

    Half of the calls of each step are its own, of a drawing about every VISIT_STEPS steps (Calibration.visited), the
    others are recorded ones of dense, which are of more captions. If the calibration cannot draw, all are recorded.

    weights: parameters by name whose zeros stay zero; {} if units were removed and no zeros stand for them. All
    other parameters are trained, in float32, with warm-up and cosine decay (by_muon). Afterwards the dtypes are as
    before. seed: decides which calls a step takes. bar: a progress bar that moves by one with each step.

    Several processes share out the calls of each step and add up their gradients. Sums in another order round
    differently: weights then differ from those of one process by about 1e-5, and not at all among the processes.
    Raises UserError if the loss is not finite, or if the device has no memory left.
    """
    generator = random.Random(seed)
    with full_precision(denoiser, weights), torch.enable_grad():
        masks = {name: weight == 0 for name, weight in weights.items()}
        parameters = list(denoiser.parameters())
        optimizer = Muon(parameters) if by_muon(denoiser, weights) else torch.optim.AdamW(
            parameters, lr=LEARNING_RATE, weight_decay=0, foreach=False)  # in little memory
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2)
        drawings = max(1, round(steps / VISIT_STEPS))
        for number, its_steps in groupby(step * drawings // steps for step in range(steps)):
            with calibration.visited(denoiser, number) as visited, taught(denoiser, calibration) as teacher:
                for _ in its_steps:
                    own = some(visited, CALLS_PER_STEP // 2, generator)
                    recorded = some(calibration.calls, CALLS_PER_STEP - len(own), generator)
                    mean = add_gradients(denoiser, own + recorded, calibration.guidance, teacher)
                    if not math.isfinite(mean):
                        raise UserError("the loss of the recovery is not finite; the recorded calls or the denoiser "
                                        "hold NaN or infinity (record in float32, or use recovery_steps=0)")
                    nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad(set_to_none=True)
                    restore_zeros(weights, masks)
                    if bar is not None:
                        bar.set_postfix(loss=f"{mean:.4g}", refresh=False)
                        bar.update()


def some(calls: Sequence[Call], count: int, generator: random.Random) -> List[Call]:
    """Return `count` of the calls at random, or all if there are fewer."""
    return [calls[index] for index in generator.sample(range(len(calls)), min(count, len(calls)))]


def by_muon(denoiser: nn.Module, weights: Dict[str, Tensor]) -> bool:
    """Return whether Muon trains the denoiser, as it does a UNet of which units were removed; all others AdamW trains.

    weights: as recover's. Muon brings back more of what is lost, but where little is lost, in shapes-mmdit and with
    zeros held, its steps cost more than they gain (docs/methods.md, Recovery).
    """
    return not weights and bool(learning_blocks(denoiser))


def learning_blocks(denoiser: nn.Module) -> List[str]:
    """Return the names of the blocks that learn from the dense denoiser's: those of UNets that are not bypassed."""
    return [name for name, block in denoiser.named_modules() if type(block) in bypass.BYPASSES]


@contextmanager
def taught(denoiser: nn.Module, calibration: Calibration) -> Iterator[Optional[Teacher]]:
    """Yield the teacher of a denoiser, on its device; None for a transformer, or if the calibration lends no dense."""
    blocks = learning_blocks(denoiser)
    with calibration.dense(next(denoiser.parameters()).device) if blocks else nullcontext() as dense:
        yield None if dense is None else Teacher(dense, blocks)


def add_gradients(denoiser: nn.Module, calls: Sequence[Call], guidance: Optional[float],
                  teacher: Optional[Teacher] = None) -> float:
    """Add the gradients of the mean loss of some calls to the parameters' own, and return that loss.

    guidance, teacher: as distillation_loss's. Each process computes its share of the calls, and all get the sum.
    """
    mean = 0.0
    for call in calls[distributed.rank::distributed.world_size]:
        try:
            loss = distillation_loss(denoiser, *call, guidance, teacher) / len(calls)
            loss.backward()
        except torch.cuda.OutOfMemoryError as error:
            raise UserError("the GPU ran out of memory in recovery; give --gradient_checkpointing or a smaller "
                            "--batch_size") from error
        mean += loss.item()
    if distributed.world_size > 1:
        for parameter in denoiser.parameters():
            if parameter.grad is None:  # there may be more processes than calls
                parameter.grad = torch.zeros_like(parameter)
        distributed.add_up(parameter.grad for parameter in denoiser.parameters())
    return sum(distributed.gather([mean]))


def distillation_loss(denoiser: nn.Module, kwargs: Dict[str, Any], target: Tensor, guidance: Optional[float] = None,
                      teacher: Optional[Teacher] = None) -> Tensor:
    """Return the mean squared error of denoiser(**kwargs) to the dense denoiser's sample, as a scalar in float32.

    guidance: the scale g if the halves of the call are unconditional, u, and conditional, c. Then the mean squared
    error of the guided output (1 − g) u + g c is added. teacher: whose blocks' errors are added too; None: of none.

    A call that was recorded in half precision is computed in mixed precision: bfloat16, whose gradients need no scale
    as float16's do, from float32 weights. A GPU that cannot computes in float32.
    """
    device = next(denoiser.parameters()).device.type
    able = device != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    with torch.autocast(device, torch.bfloat16, enabled=able and target.element_size() == 2):
        sample, outputs = answer_of_blocks(denoiser, kwargs, teacher.blocks if teacher else [])
    error = sample.float() - match(target, sample.float())
    loss = error.square().mean()
    if guidance is not None:
        loss = loss + probes.guided(error, guidance).square().mean()
    if not outputs:
        return loss
    with torch.no_grad():
        _, aims = answer_of_blocks(teacher.dense, kwargs, teacher.blocks)
    return loss + BLOCKS * sum(map(relative_error, outputs, aims)) / len(outputs)


def answer_of_blocks(denoiser: nn.Module, kwargs: Dict[str, Any], blocks: Sequence[str]) -> Tuple[Tensor, List[Tensor]]:
    """Return the sample that the denoiser gives for a call, and the tensors that its blocks return, in order."""
    outputs: List[Tensor] = []

    def note(_block, _inputs, output):
        outputs.extend(each for each in (output if isinstance(output, tuple) else (output,))
                       if isinstance(each, Tensor))

    with hooked(denoiser.get_submodule(name).register_forward_hook(note) for name in blocks):
        return answer(denoiser, kwargs), outputs


def relative_error(output: Tensor, aim: Tensor) -> Tensor:
    """Return the mean squared error of a block's output, relative to the variance of what it aims at, in float32."""
    aim = aim.float()
    return (output.float() - aim).square().mean() / aim.var().clamp_min(1e-12)


@contextmanager
def training(denoiser: nn.Module, weights: Dict[str, Tensor], calibration: Calibration) -> Iterator[str]:
    """Inside the block, the denoiser is float32 with gradients, and `recover` fits the device's memory.

    Yields a sentence that says what recovery takes. Gradient checkpointing is on if the calibration asks for it, or if
    memory is short. weights: as recover's. All processes call this together. Raises UserError with the remedy, before
    anything changes, if memory does not suffice.
    """
    device = next(denoiser.parameters()).device
    held = sum(parameter.numel() * parameter.element_size() for parameter in denoiser.parameters())
    call, by = max(calibration.calls, key=lambda call: len(call[1])), by_muon(denoiser, weights)
    with ExitStack() as lent:
        teacher = lent.enter_context(taught(denoiser, calibration))  # whose weights are then no longer free
        free = reckoning.check_weights_fit(denoiser, device, held, by)
        with full_precision(denoiser, weights):
            for asked in dict.fromkeys([calibration.recompute, True]):
                with probes.recomputing(denoiser, asked) as recomputed:
                    need = reckoning.without_activations(denoiser, by)._replace(recomputed=recomputed, activations=max(
                        call_activations(denoiser, call, free, calibration.rows, teacher),
                        muon.step_bytes(denoiser) if by else 0))
                    if need.total <= free:
                        lent.close()
                        yield f"recovery takes {need}; {device} has {gigabytes(free)} for it"
                        return
        smaller = f"give a --batch_size below {calibration.first_batch}, or " if calibration.first_batch > 1 else ""
        raise UserError(f"recovery needs {need} on {device}, which has {gigabytes(free)} for it: {smaller}"
                        f"{reckoning.instead(device)}")


def call_activations(denoiser: nn.Module, call: Call, free: int, rows: Optional[Set[tuple]] = None,
                     teacher: Optional[Teacher] = None) -> int:
    """Return reckoning.activations of a recorded call, or `free` if the GPU has no memory for two latents of it.

    rows: see sequential.one_batch. teacher: as distillation_loss's. All processes call this together.
    """
    def backward(latents: int) -> None:
        arguments, count = one_batch([call], latents, rows)
        with torch.enable_grad():
            distillation_loss(denoiser, arguments, call[1][:count], teacher=teacher).backward()

    try:
        size = reckoning.activations(denoiser, backward, len(call[1]))
    except torch.cuda.OutOfMemoryError:
        size = free
    return max(distributed.gather([size]))


@contextmanager
def full_precision(denoiser: nn.Module, weights: Dict[str, Tensor]) -> Iterator[None]:
    """Make the denoiser float32 with gradients inside the block; afterwards its dtypes and flags are as before.

    The zeros in `weights` at the end of the block stay the only zeros in `weights`.
    """
    dtypes = [tensor.dtype for tensor in _tensors(denoiser)]
    flags = [parameter.requires_grad for parameter in denoiser.parameters()]
    denoiser.float().requires_grad_(True)
    try:
        yield
    finally:
        masks = {name: weight == 0 for name, weight in weights.items()}
        for parameter, flag in zip(denoiser.parameters(), flags):
            parameter.requires_grad_(flag)
        for tensor, dtype in zip(_tensors(denoiser), dtypes):
            tensor.data = tensor.data.to(dtype)
        restore_zeros(weights, masks)


def provenance_hash(denoiser: nn.Module, calibration: Calibration, *settings) -> str:
    """Return a hash of all that decides a recovery.

    These are the settings of the method and of this file, and of each parameter of the dense denoiser and each
    target of its calls the name, dtype, shape and some values.
    """
    calls = calibration.calls
    own = (len(calls), calibration.seed, calibration.guidance, calibration.visits, calibration.teaches, BLOCKS,
           VISIT_STEPS, CALLS_PER_STEP, LEARNING_RATE, WARMUP_STEPS, GRADIENT_NORM)
    digest = hashlib.sha256(repr((settings, own)).encode())
    for name, tensor in chain(denoiser.named_parameters(), (("target", target) for _, target in calls)):
        values = tensor.detach().flatten()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(values[::max(1, len(values) // 256)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(denoiser: nn.Module, path: Optional[Path], provenance: str, rate: float) -> None:
    """Write the denoiser's parameters at `rate` to `path`, whole or not at all; do nothing if `path` is None.

    The optimizer starts afresh with each recovery, so the parameters are the whole state. Raises UserError if the
    file cannot be written.
    """
    if path is None or not distributed.is_main:
        return
    state = {name: parameter.detach().contiguous() for name, parameter in denoiser.named_parameters()}
    with whole_file(path) as part:
        try:
            save_file(state, part, metadata={"provenance": provenance, "rate": repr(rate)})
        except SafetensorError as error:  # also raised if the disk is full
            raise OSError(str(error)) from error


@torch.no_grad()
def load_checkpoint(denoiser: nn.Module, path: Optional[Path], provenance: str, rate: float) -> float:
    """Load the checkpoint at `path` into the denoiser and return its rate.

    Return 0.0 and load nothing if there is no checkpoint, or if its provenance differs or its rate is above `rate`.
    Of several processes, all call this together, and the main process reads the file.
    """
    reached = _read_checkpoint(denoiser, path, provenance, rate) if path and distributed.is_main else 0.0
    reached = distributed.broadcast(reached)
    if reached:
        distributed.broadcast_module(denoiser)
    return reached


def _read_checkpoint(denoiser: nn.Module, path: Path, provenance: str, rate: float) -> float:
    try:
        with safe_open(path, "pt") as file:
            saved = file.metadata() or {}
            if saved.get("provenance") != provenance or float(saved["rate"]) > rate:
                return 0.0
            for name, parameter in denoiser.named_parameters():
                parameter.copy_(file.get_tensor(name))
            return float(saved["rate"])
    except (OSError, SafetensorError):  # no file, or not a whole safetensors file
        return 0.0


def _tensors(denoiser: nn.Module) -> Iterator[Tensor]:
    return chain(denoiser.parameters(), denoiser.buffers())
