"""Several processes, one per GPU (`torchrun --nproc_per_node=N train.py ...`): data parallel, and no more.

Every process holds the whole model, optimiser and scheme state, and all take the same steps. What is shared
out is the work: a process plays its part of the episodes, and all then hold all trajectories; it runs its
part of a batch through the model, and gradients are summed before anyone steps. So a scheme does not know how
many processes there are. With one process, every function here gives back what it got.
"""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # the first process may evaluate or ask a judge while the others wait


class TooManyProcesses(Exception):
    """A machine has fewer GPUs than processes."""


def start() -> None:
    """Join the other processes if torchrun started this one; each gets a GPU of its own, if there are any.
    Raises TooManyProcesses if there are too few."""
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend, mine, there = "nccl", int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if mine >= there:
            raise TooManyProcesses(f"torchrun started a process for every GPU and more: there are {there}")
        torch.cuda.set_device(mine)
    dist.init_process_group(backend, timeout=PATIENCE)


def stop() -> None:
    """Leave the other processes, where all do: it waits for them. After an error do not: just end."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def neighbours() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def first() -> bool:
    """Whether this is the process that writes files and talks."""
    return rank() == 0


def share(count: int) -> range:
    """The indices out of `count` that this process works on: neighbours stay together."""
    return range(count * rank() // world(), count * (rank() + 1) // world())


def gathered(items: Sequence) -> list:
    """The items of all processes, in the order of their shares."""
    if world() == 1:
        return list(items)
    parts: list = [None] * world()
    dist.all_gather_object(parts, list(items))
    return [item for part in parts for item in part]


def total(value: float) -> float:
    """The sum of a number over all processes."""
    return sum(gathered([value])) if world() > 1 else value


def sum_gradients(tensors: Sequence[Tensor]) -> None:
    """Sum the gradients of all processes, in place."""
    if world() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor.grad)


def wait() -> None:
    """Go on when all processes are here. torchrun ends all as soon as one has failed: before leaving with an
    error that all agree on, let the first one finish what it writes."""
    total(0)


def from_first(make: Callable[[], T]) -> T:
    """What `make` gives, or raises, in the first process: for what may differ from call to call."""
    if world() == 1:
        return make()
    found: list[Any] = [None, None]
    if first():
        try:
            found[0] = make()
        except Exception as error:  # the others must not wait for it
            found[1] = error
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]
