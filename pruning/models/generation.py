"""Images from (caption, seed), and the calls of the denoiser that make them."""
from __future__ import annotations

import ctypes
import functools
import hashlib
import inspect
import time
from contextlib import contextmanager, suppress
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from pruning import UserError
from pruning.metrics.costs import denoiser_seconds, sample_of, synchronize
from pruning.models import signature
from pruning.models.hub import first_line
from pruning.models.pipelines import denoiser_name
from pruning.progress import tqdm

GPU_BATCHES = (32, 16, 8, 4, 2, 1)
CPU_BATCHES, CPU_PIXELS = (8, 16, 32), 2 ** 21  # at most, of all images of a batch: a CPU gains nothing from more
PROMPT_BYTES = 2 ** 29  # of encoded prompts that are kept
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
FREED_BYTES, FREED_BLOCK = 2 ** 28, 2 ** 25  # that may stay with the process; older glibc take no larger block


class Images(NamedTuple):
    """Generated images, how long they took, and how often the denoiser was called for a batch of them."""

    pixels: np.ndarray  # uint8 (n, height, width, 3)
    finite: np.ndarray  # bool (n,): False if the pipeline gave NaN or infinity
    seconds_each: float  # synchronised wall time / n
    calls: int  # the scheduler's time steps: more than `steps` if a step takes two calls


def keep_freed_memory() -> None:
    """Have freed memory stay with this process, for images on a CPU.

    glibc gives large blocks back to the system when they are freed. Each layer of each denoiser call takes such blocks
    for its outputs, and the system first fills each page with zeros: up to a fifth of the time of an image
    (benchmarks/README.md). Other C libraries have no such setting.
    """
    with suppress(AttributeError, OSError, TypeError):  # no function of this name, or no library without a name
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, FREED_BLOCK)
        mallopt(M_TRIM_THRESHOLD, FREED_BYTES)


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
        if np.shape(made)[1:] != (image_size, image_size, 3):
            raise UserError(f"{type(pipeline).__name__} makes images of {' x '.join(map(str, np.shape(made)[1:]))} "
                            f"numbers, not of {image_size} x {image_size} x 3; give another --image_size")
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
    arguments = signature.arguments(
        type(pipeline), [sample.caption for sample in batch], [noise_generator(sample, seed) for sample in batch],
        steps=steps, guidance_scale=guidance_scale, image_size=image_size, output_type=output_type)
    try:
        made = pipeline(**arguments)
    except ValueError as error:  # pipelines refuse their arguments so, above all an image size
        raise UserError(f"{type(pipeline).__name__} cannot make these images: {first_line(error)}") from error
    return signature.images(type(pipeline), made, output_type)


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
    _tell_halves(len(batch), half)
    return np.concatenate([_call_by_halves(pipeline, part, *settings) for part in (batch[:half], batch[half:])])


def _tell_halves(images: int, half: int) -> None:
    tqdm.write(f"no GPU memory for {images} images at once: continuing with halves, as --batch_size {half} would")


def fitting_batch_size(pipeline, sample, count: int, device: str, asked: Optional[int] = None, *, steps: int,
                       guidance_scale: float, image_size: int) -> int:
    """Return how many of `count` images to draw together: the most that fit a GPU, on a CPU the fastest.

    asked: the user's number. For a GPU without memory for so many it is halved until they fit, with a line each time.
    """
    import torch
    settings = dict(seed=0, steps=steps, guidance_scale=guidance_scale, image_size=image_size)
    if torch.device(device).type == "cpu":
        if asked:
            return asked
        most = max(1, CPU_PIXELS // image_size ** 2)
        sizes = [size for size in CPU_BATCHES if size <= most and size < 2 * count] or [min(most, CPU_BATCHES[0])]
        return fastest_batch_size(pipeline, sample, sizes, **settings) if len(sizes) > 1 else sizes[0]
    whole = min(asked, count) if asked else 0
    sizes = [whole >> halvings for halvings in range(whole.bit_length())] or GPU_BATCHES
    for size, half in zip(sizes, sizes[1:]):
        try:
            with computing_once(pipeline):
                _call(pipeline, [sample] * size, **settings)
            return asked if size == whole else size
        except torch.cuda.OutOfMemoryError:
            pass
        torch.cuda.empty_cache()
        if asked:
            _tell_halves(size, half)
    return sizes[-1]


def fastest_batch_size(pipeline, sample, sizes: Sequence[int], **settings) -> int:
    """Return the size, of growing sizes, from which the next one no longer saves 3 % of the time an image.

    Larger batches use the threads of a CPU better, smaller ones its caches: which counts more differs between models.
    The time is that of a denoiser call; calls of two sizes alternate.
    """
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    calls = (first_call(pipeline, [sample] * size, batch_size=size, **settings) for size in sizes)
    best, call = sizes[0], next(calls)
    for size, larger in zip(sizes[1:], calls):
        seconds = [[denoiser_seconds([denoiser], each, rounds=1)[0] for each in (call, larger)] for _ in range(3)]
        before, after = np.median(seconds, axis=0) / (best, size)
        if after > 0.97 * before:
            break
        best, call = size, larger
    return best


def remember_prompts(pipeline) -> None:
    """Make the pipeline encode each batch of prompts once, as every rate draws the same prompts.

    The results stay on the CPU. Beyond PROMPT_BYTES, prompts are encoded again each time.
    """
    import torch
    if not hasattr(pipeline, "encode_prompt"):  # encodes within its call
        return
    encode, known, held = pipeline.encode_prompt, {}, [0]

    @functools.wraps(encode)
    def remembering(*args, **kwargs):
        key = repr((args, sorted(kwargs.items())))
        if any(isinstance(value, torch.Tensor) for value in (*args, *kwargs.values())):
            return encode(*args, **kwargs)
        if key not in known:
            encoded = encode(*args, **kwargs)
            if not isinstance(encoded, tuple):
                return encoded
            size = sum(part.numel() * part.element_size() for part in encoded if isinstance(part, torch.Tensor))
            if held[0] + size > PROMPT_BYTES:
                return encoded
            held[0] += size
            known[key] = [(part.to("cpu"), part.device) if isinstance(part, torch.Tensor) else (part, None)
                          for part in encoded]
        return tuple(part.to(device) if device else part for part, device in known[key])

    pipeline.encode_prompt = remembering


@contextmanager
def computing_once(pipeline):
    """Let only the denoiser's first call compute during the block: calls of the same shapes get its output again.

    So a pipeline goes through all its steps and decodes in the time of one. Yields the list of the calls that compute,
    as keyword arguments. A step of the pipeline's last image is as good as another for shapes, costs and memory.
    """
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    forward, hooked = denoiser.forward, "forward" in vars(denoiser)
    takes, outputs, calls = inspect.signature(forward), {}, []

    def once(*args, **kwargs):
        given = takes.bind(*args, **kwargs).arguments
        shapes = _shapes(list(given.values()))
        if shapes not in outputs:
            calls.append({name: value for name, value in given.items() if value is not None and name != "return_dict"})
            outputs[shapes] = forward(*args, **kwargs)
        return outputs[shapes]

    denoiser.forward = functools.wraps(forward)(once)
    try:
        yield calls
    finally:
        if hooked:
            denoiser.forward = forward
        else:
            del denoiser.forward


def _shapes(value):
    """Return the shapes of the tensors in a value, in tuples as deep as its lists."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_shapes, value))
    return tuple(value.shape) if hasattr(value, "shape") else None


def first_call(pipeline, samples, **settings) -> dict:
    """Return the keyword arguments of the denoiser's first call when images of `samples` are made.

    settings: those of `generate`. The denoiser computes only that call. Raises UserError as `generate` does.
    """
    with computing_once(pipeline) as calls:
        generate(pipeline, samples, **settings)
    return calls[0]


def check_makes_images(pipeline, sample, **settings) -> None:
    """Raise UserError if the pipeline cannot make an image of a caption alone with these settings of `generate`."""
    takes = signature.more_than_a_caption(type(pipeline))
    hint = f"; its call takes {', '.join(takes)} too, and here it gets a caption alone" if takes else ""
    try:
        first_call(pipeline, [sample], **settings)
    except UserError as error:
        raise UserError(f"{error}{hint}") from error
    except Exception as error:  # each pipeline fails in its own way if it needs more than a caption
        raise UserError(f"{type(pipeline).__name__} cannot make an image of {settings['image_size']} pixels a side of "
                        f"a caption: {first_line(error)}{hint}") from error


def one_step(pipeline, samples, **settings) -> None:
    """Make images of `samples` in one step, or in all steps if the pipeline takes no single step."""
    try:
        generate(pipeline, samples, **{**settings, "steps": 1})
    except UserError:
        generate(pipeline, samples, **settings)


def record_calls(pipeline, samples, keep: Callable = lambda value: value, **settings) -> List[Tuple[dict, object]]:
    """Make images of `samples` and return every call of the denoiser as (keyword arguments, output sample).

    keep: returns what is kept of the arguments, and of the sample, which is detached.
    settings: those of `generate`. Whatever the pipeline passes to its denoiser is recorded, so no model family
    needs code of its own.
    """
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    takes, calls = inspect.signature(denoiser.forward), []

    def note(_module, args, kwargs, output):
        given = takes.bind(*args, **kwargs).arguments
        arguments = {name: value for name, value in given.items() if value is not None and name != "return_dict"}
        calls.append((keep(arguments), keep(sample_of(output).detach())))

    hook = denoiser.register_forward_hook(note, with_kwargs=True)
    try:
        generate(pipeline, samples, **settings)
    finally:
        hook.remove()
    return calls
