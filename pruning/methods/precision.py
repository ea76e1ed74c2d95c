"""The precision that weights really have: numbers of half precision are often held in float32, to compute with them."""
from __future__ import annotations

from typing import Iterable, Optional

import torch
from torch import Tensor, nn


def narrowest(tensors: Iterable[Tensor]) -> Optional[torch.dtype]:
    """Return the half precision in which all float32 numbers stay the same, None if there is none."""
    left = [torch.float16, torch.bfloat16]
    for tensor in filter(is_wide, tensors):
        left = [dtype for dtype in left if torch.equal(tensor.to(dtype).float(), tensor)]
        if not left:
            return None
    return left[0]


def is_wide(tensor: Tensor) -> bool:
    """Return whether a tensor holds float32 numbers."""
    return tensor.dtype == torch.float32


@torch.no_grad()
def round_to(module: nn.Module, dtype: torch.dtype) -> None:
    """Round the float32 numbers of a module to those of `dtype`, in place. What is not zero stays so.

    Nothing is done if a number is beyond what `dtype` holds.
    """
    wide = [tensor for tensor in module.state_dict().values() if is_wide(tensor)]
    limits = torch.finfo(dtype)
    if any(tensor.abs().max() > limits.max for tensor in wide if tensor.numel()):
        return
    for tensor in wide:
        rounded = tensor.to(dtype).float()
        least = tensor.new_tensor(limits.tiny).copysign(tensor)  # a kept weight made zero would count as pruned
        tensor.copy_(torch.where((rounded == 0) & (tensor != 0), least, rounded))
