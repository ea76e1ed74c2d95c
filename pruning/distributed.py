"""One process, or several that `accelerate launch` started. One process needs neither torch nor accelerate here."""
from __future__ import annotations

import os
from contextlib import contextmanager
from datetime import timedelta

from pruning import UserError

world_size = int(os.environ.get("WORLD_SIZE", 1))
rank = int(os.environ.get("RANK", 0))
is_main = rank == 0  # the process that measures, writes and prints
TIMEOUT = timedelta(hours=6)  # the others wait at a barrier while the main process scores a point


def initialize(device: str) -> str:
    """Initialise torch.distributed and return this process's device."""
    if world_size == 1:
        return device
    from accelerate import PartialState
    state = PartialState(cpu=device == "cpu", timeout=TIMEOUT)
    return device if device == "cpu" else f"cuda:{state.local_process_index}"


@contextmanager
def _collective():
    """Run a collective operation. Raises UserError if another process has ended, which has printed why."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(f"process {rank} of {world_size} stopped because another process stopped "
                        f"({str(error).splitlines()[0]})") from None


def barrier() -> None:
    """Wait until all processes have come here."""
    if world_size > 1:
        from accelerate import PartialState
        with _collective():
            PartialState().wait_for_everyone()


@contextmanager
def main_first():
    """Run the block in the main process first, then in the others, which use the files that the first has fetched."""
    if not is_main:
        barrier()
    yield
    if is_main:
        barrier()


def broadcast_module(module) -> None:
    """Copy the main process's tensors of a torch module to all other processes."""
    if world_size > 1:
        import torch
        with _collective():
            for tensor in module.state_dict().values():
                torch.distributed.broadcast(tensor, 0)


def broadcast(value):
    """Return the main process's value in all processes."""
    if world_size == 1:
        return value
    import torch
    values = [value]
    with _collective():
        torch.distributed.broadcast_object_list(values, 0)  # accelerate's own does nothing between CPU processes
    return values[0]


def gather(items: list) -> list:
    """Return the lists of all processes as one list, in the order of the processes. Tensors must be on the CPU."""
    if world_size == 1:
        return items
    import torch
    lists = [None] * world_size
    with _collective():
        torch.distributed.all_gather_object(lists, items)
    return [item for each in lists for item in each]


def add_up(tensors) -> None:
    """Replace each tensor by its sum over all processes, in place."""
    if world_size > 1:
        import torch
        with _collective():
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)
