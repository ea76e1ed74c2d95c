"""One process, or several that `accelerate launch` started to share out the making of images. No torch for one."""
from __future__ import annotations

import os
from contextlib import contextmanager
from datetime import timedelta

from pruning import UserError

count = int(os.environ.get("WORLD_SIZE", 1))
rank = int(os.environ.get("RANK", 0))
first = rank == 0  # the process that measures, writes and talks


def begin(device: str) -> str:
    """Meet the other processes; the device of this one."""
    if count == 1:
        return device
    from accelerate import PartialState
    # The first scores a point while the others wait for it, which takes its time with many images.
    state = PartialState(cpu=device == "cpu", timeout=timedelta(hours=6))
    return device if device == "cpu" else f"cuda:{state.local_process_index}"


@contextmanager
def _meeting():
    """What all processes do together; UserError where another has ended, which has said why."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(f"process {rank} of {count} stopped, as another did ({str(error).splitlines()[0]})") from None


def wait() -> None:
    """Go on when all processes have come here."""
    if count > 1:
        from accelerate import PartialState
        with _meeting():
            PartialState().wait_for_everyone()


@contextmanager
def in_turn():
    """The first process, and then the others, as it fetches what they find."""
    if not first:
        wait()
    yield
    if first:
        wait()


def share(module) -> None:
    """Give the first process's tensors of a module to all others."""
    if count > 1:
        import torch
        with _meeting():
            for tensor in module.state_dict().values():
                torch.distributed.broadcast(tensor, 0)


def agree(value):
    """The first process's value, in all of them."""
    if count == 1:
        return value
    from accelerate.utils import broadcast_object_list
    with _meeting():
        return broadcast_object_list([value])[0]
