"""Images from (caption, seed), and the calls of the denoiser that make them."""
from __future__ import annotations

import functools
import hashlib
import inspect
import time
from typing import Callable, List, NamedTuple, Optional, Tuple

import numpy as np
from tqdm import tqdm

from pruning import UserError
from pruning.metrics.costs import synchronize
from pruning.models.pipelines import denoiser_name, first_line

CPU_BATCH, GPU_BATCHES = 8, (32, 16, 8, 4, 2, 1)  # a CPU gains nothing from larger batches
PROMPT_BYTES = 2 ** 31  # of encoded prompts that are kept


class Images(NamedTuple):
    """Generated images, how long they took, and how often the denoiser was called for a batch of them."""

    pixels: np.ndarray  # uint8 (n, height, width, 3)
    finite: np.ndarray  # bool (n,): False if the pipeline gave NaN or infinity
    seconds_each: float  # synchronised wall time / n
    calls: int  # the scheduler's time steps: more than `steps` if a step takes two calls


def noise_generator(sample, seed: int):
    """Return the random generator of a sample. It depends on the sample's id, its repeat and the seed alone."""
    import torch
    digest = hashlib.sha256(f"{seed + sample.repeat}/{sample.id}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def generate(pipeline, samples, *, seed: int, steps: int, guidance_scale: float, image_size: int, batch_size: int,
             on_batch: Optional[Callable[[int], None]] = None) -> Images:
    """Make one image a sample, `batch_size` at a time. `on_batch(count)` is called after every batch.

    Values that are not finite become black or white and are marked in `finite`.

    Raises UserError if the pipeline makes images of another size than `image_size` pixels a side, refuses the
    settings, or has no memory for one image.
    """
    pixels, finite, seconds = [], [], 0.0
    for start in range(0, len(samples), batch_size):
        batch = samples[start:start + batch_size]
        synchronize(pipeline.device)
        started = time.perf_counter()
        made = _call_by_halves(pipeline, batch, seed, steps, guidance_scale, image_size)
        synchronize(pipeline.device)
        seconds += time.perf_counter() - started
        if made.shape[1:3] != (image_size, image_size):
            raise UserError(f"{type(pipeline).__name__} makes images of {made.shape[2]} x {made.shape[1]} pixels, not "
                            f"of {image_size} a side; give another --image_size")
        finite.append(np.isfinite(made).all(axis=(1, 2, 3)))
        pixels.append((np.nan_to_num(made, posinf=1.0, neginf=0.0).clip(0, 1) * 255).round().astype(np.uint8))
        if on_batch:
            on_batch(len(batch))
    return Images(np.concatenate(pixels), np.concatenate(finite), seconds / len(samples),
                  len(pipeline.scheduler.timesteps))


def final_latents(pipeline, samples, *, seed: int, steps: int, guidance_scale: float, image_size: int):
    """Return the final latents of some samples, drawn together, as the pipeline has them before it decodes them."""
    return _call(pipeline, samples, seed, steps, guidance_scale, image_size, output_type="latent")


def _call(pipeline, batch, seed: int, steps: int, guidance_scale: float, image_size: int, output_type: str = "np"):
    """Return the images of a batch in [0, 1], float (n, height, width, 3), or its latents."""
    # Resolution binning would sample another size than the one asked for. Not every pipeline has these arguments.
    options = {"guidance_scale": guidance_scale, "use_resolution_binning": False}
    takes = inspect.signature(type(pipeline).__call__).parameters
    options = {name: value for name, value in options.items() if name in takes}
    try:
        return pipeline(
            prompt=[sample.caption for sample in batch], num_inference_steps=steps, height=image_size,
            width=image_size, output_type=output_type, generator=[noise_generator(sample, seed) for sample in batch],
            **options).images
    except ValueError as error:  # pipelines refuse their arguments so, above all an image size
        raise UserError(f"{type(pipeline).__name__} cannot make these images: {first_line(error)}") from error


def _call_by_halves(pipeline, batch, *settings) -> np.ndarray:
    """Return _call's images. If GPU memory runs out, halve the batch and print a message."""
    import torch
    try:
        return _call(pipeline, batch, *settings)
    except torch.cuda.OutOfMemoryError as error:
        if len(batch) == 1:
            raise UserError("the GPU has no memory for one image; try --offload model, --dtype bfloat16 or a smaller "
                            f"--image_size ({first_line(error)})") from error
    torch.cuda.empty_cache()  # outside the handler, which holds the tensors of the failed call
    half = len(batch) // 2
    tqdm.write(f"no GPU memory for {len(batch)} images at once: continuing with halves, as --batch_size {half} would")
    return np.concatenate([_call_by_halves(pipeline, part, *settings) for part in (batch[:half], batch[half:])])


def fitting_batch_size(pipeline, sample, device: str, guidance_scale: float, image_size: int) -> int:
    """Return the largest of GPU_BATCHES that the GPU has memory for, or CPU_BATCH on a CPU."""
    import torch
    if torch.device(device).type == "cpu":
        return CPU_BATCH
    for size in GPU_BATCHES[:-1]:
        try:
            _call(pipeline, [sample] * size, 0, 1, guidance_scale, image_size)
            return size
        except torch.cuda.OutOfMemoryError:
            pass
        torch.cuda.empty_cache()
    return GPU_BATCHES[-1]


def remember_prompts(pipeline) -> None:
    """Make the pipeline encode each batch of prompts once, as every rate draws the same prompts.

    The results stay on the CPU. Beyond PROMPT_BYTES, prompts are encoded again each time.
    """
    import torch
    encode, known, held = pipeline.encode_prompt, {}, [0]

    @functools.wraps(encode)
    def remembering(*args, **kwargs):
        key = repr((args, sorted(kwargs.items())))
        if any(isinstance(value, torch.Tensor) for value in (*args, *kwargs.values())):
            return encode(*args, **kwargs)
        if key not in known:
            encoded = encode(*args, **kwargs)
            size = sum(part.numel() * part.element_size() for part in encoded if isinstance(part, torch.Tensor))
            if held[0] + size > PROMPT_BYTES:
                return encoded
            held[0] += size
            known[key] = [(part.to("cpu"), part.device) if isinstance(part, torch.Tensor) else (part, None)
                          for part in encoded]
        return tuple(part.to(device) if device else part for part, device in known[key])

    pipeline.encode_prompt = remembering


def first_call(pipeline, samples, **settings) -> dict:
    """Return the keyword arguments of the denoiser's call if images of `samples` are made in one step."""
    return record_calls(pipeline, samples, **{**settings, "steps": 1})[0][0]


def record_calls(pipeline, samples, keep: Callable = lambda value: value, **settings) -> List[Tuple[dict, object]]:
    """Make images of `samples` and return every call of the denoiser as (keyword arguments, output sample).

    keep: returns what is kept of the arguments, and of the sample, which is detached.
    settings: those of `generate`. Whatever the pipeline passes to its denoiser is recorded, so no model family
    needs code of its own.
    """
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    signature = inspect.signature(denoiser.forward)
    calls = []

    def note(_module, args, kwargs, output):
        given = signature.bind(*args, **kwargs).arguments
        arguments = {name: value for name, value in given.items() if value is not None and name != "return_dict"}
        calls.append((keep(arguments), keep(output[0].detach())))

    hook = denoiser.register_forward_hook(note, with_kwargs=True)
    try:
        generate(pipeline, samples, **settings)
    finally:
        hook.remove()
    return calls
