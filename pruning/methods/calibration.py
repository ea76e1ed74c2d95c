"""What a method may learn from: recorded calls of the dense denoiser."""
from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Tuple

if TYPE_CHECKING:
    from torch import Tensor, nn

Call = Tuple[Dict[str, Any], "Tensor"]  # the keyword arguments of a denoiser call, and the sample that it returned


class Calibration:
    """Recorded calls of the dense denoiser, a seed, and a file for a method's state between two rates.

    The calls come from images that the dense pipeline makes of captions that are never measured; `record` makes these
    images and returns the calls. It is called when a method first asks for `calls`, as recording takes minutes and a
    method may need no calls at all.
    """

    def __init__(self, record: Callable[[], List[Call]], seed: int,
                 checkpoint: Optional[Path] = None, guidance_scale: float = 1.0, first_batch: int = 0):
        self._record = record
        self._results: Dict[str, Any] = {}
        self.guidance_scale = guidance_scale  # of the images
        self.first_batch = first_batch  # images of the first call
        self.seed = seed  # seeds everything that a method draws
        self.checkpoint = checkpoint  # a file that the method may write and read; None: nothing is kept

    @cached_property
    def calls(self) -> List[Call]:
        """(keyword arguments, output sample) of each call, recorded once and then kept.

        Arguments and samples are as the pipeline passed them, on its device and in its dtype.
        """
        return self._record()

    @property
    def guidance(self) -> Optional[float]:
        """The guidance scale if a call's output holds two halves, unconditional and conditional; else None."""
        return self.guidance_scale if len(self.calls[0][1]) == 2 * self.first_batch else None

    def once(self, key: str, compute: Callable[[], Any]) -> Any:
        """Return compute() of the first call with this key: what all rates of a sweep share."""
        if key not in self._results:
            self._results[key] = compute()
        return self._results[key]


def answer(denoiser: nn.Module, arguments: Dict[str, Any]) -> Tensor:
    """Return the sample that the denoiser gives for a recorded call's arguments, on its device and in its dtype."""
    output = denoiser(**match(arguments, next(denoiser.parameters())))
    return output[0] if isinstance(output, tuple) else output.sample


def match(value, like: Tensor):
    """Return tensors, nested ones too, on the device of `like` and floating ones in its dtype; other values as is."""
    from torch import Tensor  # here, because the commands import this file before they need torch
    if isinstance(value, Tensor):
        return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, dict):
        return {name: match(item, like) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(match(item, like) for item in value)
    return value
