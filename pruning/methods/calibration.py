"""What a method may learn from: recorded calls of the dense denoiser, and what was computed from them."""
from __future__ import annotations

import hashlib
import pickle
import tempfile
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, ContextManager, Dict, Iterable, List, Optional, Set, Tuple

from pruning import UserError, distributed, whole_file
from pruning.metrics.costs import sample_of

if TYPE_CHECKING:
    from torch import Tensor, nn

Call = Tuple[Dict[str, Any], "Tensor"]  # the keyword arguments of a denoiser call, and the sample that it returned
BATCH = 8  # images that are drawn together at most: methods use a few calls, and these then cover more steps
GIB = 2 ** 30
MEMORY = 4 * GIB  # bytes of moments that are gathered in one pass


class Calibration:
    """Recorded calls of the dense denoiser, a seed, and folders for what methods compute from the calls.

    The calls come from images that the dense pipeline makes of captions that are never measured; `record` makes these
    images and returns the calls. With another denoiser, `sample` draws some of them, for methods that ask for latents,
    and `visit` records calls, for recovery, which also has `lend` bring the dense denoiser to a device. `record` is
    called when a method first asks for `calls`, as recording takes minutes and a method may need no calls at all. Of
    several processes, all must ask for calls at the same time.
    `other` returns, once there are calls, the arguments of a call for another number of images.
    """

    def __init__(self, record: Callable[[], List[Call]], seed: int, *, checkpoint: Optional[Path] = None,
                 guidance_scale: float = 1.0, first_batch: int = 0, folder: Optional[Path] = None,
                 memory: int = MEMORY, sample: Optional[Callable[[nn.Module, int], Tensor]] = None,
                 recompute: bool = False, other: Optional[Callable[[], Dict[str, Any]]] = None,
                 visit: Optional[Callable[[nn.Module, int], ContextManager[List[Call]]]] = None,
                 lend: Optional[Callable[[Any], ContextManager[nn.Module]]] = None):
        self._record = record
        self._sample = sample
        self._other = other
        self._visit = visit
        self._lend = lend
        self._kept: Dict[str, Dict[str, Tensor]] = {}
        self._dense_latents: Dict[int, Tensor] = {}
        self._scratch = None if folder else tempfile.TemporaryDirectory()  # removed with this object
        self.folder = folder or Path(self._scratch.name)  # of what `keep` writes; other runs may use the same
        self.memory = memory  # bytes of moments that may be in memory together
        self.recompute = recompute  # whether recovery checkpoints gradients, also if memory is not short
        self.guidance_scale = guidance_scale  # of the images
        self.first_batch = first_batch  # images of the first call
        self.seed = seed  # seeds everything that a method draws
        self.checkpoint = checkpoint  # a file that the method may write and read; None: nothing is kept

    @cached_property
    def calls(self) -> List[Call]:
        """(keyword arguments, output sample) of each call on the CPU, recorded once.

        `answer` passes the arguments of a call to a denoiser on any device. Raises UserError if there are no calls, or
        if an output is not finite.
        """
        calls = self._record()
        if not calls:
            raise UserError("there are no calls of the dense denoiser to calibrate on; give --calibration_images 1 or "
                            "more")
        if not all(bool(output.isfinite().all()) for _, output in calls):
            raise UserError("the dense denoiser gives NaN or infinity on the calibration captions; use --dtype float32 "
                            "or check the weights of the model")
        return calls

    @property
    def visits(self) -> bool:
        """Whether visited() can draw."""
        return self._visit is not None

    def visited(self, denoiser: nn.Module, number: int) -> ContextManager[List[Call]]:
        """Return a context of the calls of this denoiser while it draws training captions, with dense's samples.

        Without a way to draw there are none. The denoiser stays as it is. number: of the drawing; others have other
        noise and captions. The calls are on disk during the context. All processes call this together, with equal
        denoisers.
        """
        return self._visit(denoiser, number) if self.visits else nullcontext([])

    @property
    def teaches(self) -> bool:
        """Whether dense() lends the dense denoiser."""
        return self._lend is not None

    def dense(self, device) -> ContextManager[Optional[nn.Module]]:
        """Return a context of the dense denoiser on this device; of None, if nothing lends it."""
        return self._lend(device) if self.teaches else nullcontext()

    @property
    def guidance(self) -> Optional[float]:
        """The guidance scale if a call's output holds two halves, unconditional and conditional; else None."""
        return self.guidance_scale if len(self.calls[0][1]) == 2 * self.first_batch else None

    @cached_property
    def rows(self) -> Set[tuple]:
        """Where the arguments of the calls have a row for each latent. See latent_rows."""
        arguments, output = self.calls[0]
        return latent_rows(arguments, len(output), self._other and self._other())

    def latents(self, denoiser: nn.Module, captions: int) -> Tensor:
        """Return the final latents of some training captions, sampled in a few steps with this denoiser, float32.

        There may be fewer captions. Raises UserError if the calibration was made without a way to sample.
        """
        if self._sample is None:
            raise UserError("this method samples with the pruned denoiser; give a calibration that can (sample=)")
        return self._sample(denoiser, captions).float()

    def dense_latents(self, denoiser: nn.Module, captions: int) -> Tensor:
        """Return `latents` of the dense denoiser, which is sampled once for all rates. Raises as `latents` does."""
        if captions not in self._dense_latents:
            self._dense_latents[captions] = self.latents(denoiser, captions)
        return self._dense_latents[captions]

    def keep(self, key: str, compute: Callable[[], Dict[str, Tensor]]) -> Dict[str, Tensor]:
        """Return compute(), tensors by name on the CPU, from memory or from the folder if they were computed before.

        key: says what is computed and with which settings; the calls and the code need not be in it.
        """
        if key not in self._kept:
            path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
            found = read_tensors(path)
            if found is None:
                found = compute()
                write_tensors(found, path)
            self._kept[key] = found
        return self._kept[key]


def latent_rows(arguments: Dict[str, Any], latents: int, other: Optional[Dict[str, Any]] = None) -> Set[tuple]:
    """Return where a call's arguments hold a tensor with a row, or a list with an item, for each of the call's latents.

    A place is a tuple of keys. A table may happen to have as many rows. It has them in any call, so `other`, the
    arguments of a call for another number of latents, tells. Without it, the table is taken for rows of latents.
    """
    known = _lengths(other)
    others = next(iter(known.values()), latents)  # of the sample, which is a denoiser's first argument
    return {place for place, length in _lengths(arguments).items()
            if length == latents and known.get(place, others) == others}


def _lengths(value: Any, place: tuple = ()) -> Dict[tuple, int]:
    """Return how many rows each tensor in a value has, and how many items each list, by place."""
    from torch import Tensor
    found = {place: len(value)} if isinstance(value, list) or isinstance(value, Tensor) and value.dim() else {}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, item in items:
        found.update(_lengths(item, (*place, key)))
    return found


def read_tensors(path: Path) -> Optional[Dict[str, Tensor]]:
    """Return the tensors of a safetensors file, or None if there is no file that can be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file  # here, because the commands import this file before they need torch
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None


def write_tensors(tensors: Dict[str, Tensor], path: Path) -> None:
    """Write tensors as a safetensors file, whole or not at all. Raises UserError if the disk refuses."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    with whole_file(path, sync=False) as part:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
        except SafetensorError as error:  # also raised if the disk is full
            raise OSError(str(error)) from error


def read_calls(path: Path) -> Optional[List[Call]]:
    """Return the calls that write_calls wrote, or None if there is no file that can be read.

    Their tensors are views of the file: the system reads what is used, and takes the memory back when it is short.
    """
    import torch
    try:
        return torch.load(str(path), map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
        return None


def write_calls(calls: List[Call], path: Path) -> None:
    """Write recorded calls, whole or not at all. Raises UserError if the disk refuses."""
    import torch
    with whole_file(path, sync=False) as part:
        try:
            torch.save(calls, str(part))
        except RuntimeError as error:  # torch's writer says so if the disk is full
            raise OSError(str(error).splitlines()[0]) from error


def recorded(paths: List[Path], record: Callable[[List[Path]], Iterable[Tuple[Path, List[Call]]]]) -> List[Call]:
    """Return the calls in some files. Those that cannot be read are written first, by record(paths), a file at a time.

    All processes call this together and share out the files. None holds more than the calls of one file in memory.
    Raises UserError if the processes do not see each other's files.
    """
    missing = distributed.broadcast([path for path in paths if read_calls(path) is None])  # as the main process sees it
    own = missing[distributed.rank::distributed.world_size]
    for path, calls in record(own) if own else ():
        write_calls(calls, path)
    distributed.barrier()
    found = {path: read_calls(path) for path in paths}
    for path, calls in found.items():
        if calls is None:
            raise UserError(f"cannot read {path}, which holds recorded calls of the denoiser: let PRUNING_CACHE name a "
                            "folder that all processes share")
    return [call for calls in found.values() for call in calls]


def answer(denoiser: nn.Module, arguments: Dict[str, Any]) -> Tensor:
    """Return the sample that the denoiser gives for a recorded call's arguments, on its device and in its dtype."""
    return sample_of(denoiser(**match(arguments, next(denoiser.parameters()))))


def match(value, like: Tensor):
    """Return tensors, nested ones too, on the device of `like` and floating ones in its dtype; other values as is."""
    return _each_tensor(value, lambda tensor: tensor.to(
        like.device, like.dtype if tensor.is_floating_point() else tensor.dtype))


def keep_once() -> Callable[[Any], Any]:
    """Return a function that copies tensors, nested ones too, to the CPU, and gives equal tensors as one object.

    Text states are alike at all steps; without this, the recorded calls of Flux would take 15 GB.
    """
    import torch
    known: Dict[tuple, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        # A number that was expanded to one row passes for contiguous and cannot be viewed as bytes; a copy can.
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
        content = hashlib.sha1(tensor.reshape(-1).view(torch.uint8).numpy()).digest()
        return known.setdefault((content, tensor.dtype, tensor.shape), tensor)

    return lambda value: _each_tensor(value, keep)


def _each_tensor(value, change: Callable[[Tensor], Tensor]):
    """Return `value` with each tensor changed, also in dicts, lists and tuples."""
    from torch import Tensor
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _each_tensor(item, change) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_each_tensor(item, change) for item in value)
    return value
