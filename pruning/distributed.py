"""One process, or several that `accelerate launch` or torchrun started. One process needs no torch here.

Tensors on the CPU are exchanged by gloo, tensors on GPUs by NCCL, or if two processes share a GPU, by gloo too.
"""
from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from datetime import timedelta

from pruning import UserError


def _set_by_launcher(name: str, default: int) -> int:
    """Return the whole number in an environment variable. Ends the program with one line if it holds something else."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        print(f"error: {name}={text} must be a whole number; a launcher sets it, else leave it unset", file=sys.stderr)
        raise SystemExit(2)
    return int(text)


world_size = _set_by_launcher("WORLD_SIZE", 1)
rank = _set_by_launcher("RANK", 0)
local_size = _set_by_launcher("LOCAL_WORLD_SIZE", world_size)  # processes on this machine
is_main = rank == 0  # the process that gathers, writes and prints
TIMEOUT = timedelta(hours=6)  # processes wait for the slowest, which may have the most images to make


def own_device(device: str) -> str:
    """Return this process's device: `device`, or of several processes on GPUs each takes the next one in turn."""
    if world_size == 1 or device == "cpu":
        return device
    import torch
    device = f"cuda:{int(os.environ.get('LOCAL_RANK', rank)) % torch.cuda.device_count()}"
    torch.cuda.set_device(device)
    return device


def _backend() -> str:
    import torch
    gpus = torch.cuda.device_count() if torch.distributed.is_nccl_available() else 0
    return "cpu:gloo,cuda:nccl" if 0 < local_size <= gpus else "gloo"


@contextmanager
def _collective():
    """Run a collective operation of torch.distributed, the block's value, in all processes.

    Raises UserError if another process has ended, which has printed why.
    """
    import torch
    if not torch.distributed.is_initialized():
        try:
            torch.distributed.init_process_group(_backend(), timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"WORLD_SIZE={world_size} says that several processes run, but they do not find each other "
                            f"({str(error).splitlines()[0]}); start them with accelerate launch or torchrun, or unset "
                            "WORLD_SIZE") from None
    try:
        yield torch.distributed
    except RuntimeError as error:
        raise UserError(f"process {rank} of {world_size} stopped because another process stopped "
                        f"({str(error).splitlines()[0]})") from None


def barrier() -> None:
    """Wait until all processes have come here."""
    if world_size > 1:
        with _collective() as group:
            group.barrier()


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
        with _collective() as group:
            for tensor in module.state_dict().values():
                group.broadcast(tensor, 0)


def broadcast(value):
    """Return the main process's value in all processes."""
    if world_size == 1:
        return value
    values = [value]
    with _collective() as group:
        group.broadcast_object_list(values, 0)
    return values[0]


def gather(items: list) -> list:
    """Return the lists of all processes as one list, in the order of the processes. Tensors must be on the CPU."""
    if world_size == 1:
        return items
    lists = [None] * world_size
    with _collective() as group:
        group.all_gather_object(lists, items)
    return [item for each in lists for item in each]


def collect(items: list) -> list:
    """Return the lists of all processes as one list, in the order of the processes, in the main process; else []."""
    if world_size == 1:
        return items
    lists = [None] * world_size if is_main else None
    with _collective() as group:
        group.gather_object(items, lists)
    return [item for each in lists or () for item in each]


def add_up(tensors) -> None:
    """Replace each tensor by its sum over all processes, in place."""
    if world_size > 1:
        with _collective() as group:
            for tensor in tensors:
                group.all_reduce(tensor)
