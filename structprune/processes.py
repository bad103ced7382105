"""The processes of torchrun: who is there, and what is shared between them. Without torch.distributed all of this does nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_SHARED = ContextVar("_SHARED", default=False)


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Meet the other processes of `torchrun`, where there are any, and part from them at the end. A group that is already there stays."""
    mine = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where NCCL puts what it sends of its own accord
    if mine:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        if mine:
            dist.destroy_process_group()


def local_device(device: str) -> str:
    """'cuda:1' for the 'cuda' of the process that `torchrun` calls local rank 1."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def rank() -> int:
    """The number of this process, from 0; also before and after the processes have met."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def count() -> int:
    """How many processes there are, once they have met."""
    return dist.get_world_size() if dist.is_initialized() else 1


def from_first(value: Any) -> Any:
    """What the first process holds, on every process."""
    if count() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, 0)
    return held[0]


def equalise(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's values, in place."""
    if count() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


# --- work on samples that all processes share ----------------------------------------------------------------------------------


@contextmanager
def sharing(wanted: bool) -> Iterator[None]:
    """Until the end all processes go through the same work on the same samples, and each does its share of it.

    Only where that is `wanted`: a process that compresses while the others do something else must not wait for them.
    """
    if not wanted:
        yield
        return
    token = _SHARED.set(True)
    try:
        with joined(torch.device("cpu")):
            yield
    finally:
        _SHARED.reset(token)


def sharers() -> int:
    """How many processes share the work on samples."""
    return count() if _SHARED.get() else 1


def share_of(things: Iterable[T]) -> list[T]:
    """Those that are this process's to work on: every n-th, for neighbours may be alike."""
    return list(islice(things, rank(), None, sharers())) if sharers() > 1 else list(things)


def total(*own: Tensor) -> tuple[Tensor, ...]:
    """The sum over the processes of each."""
    if sharers() == 1:
        return own
    sums = [value.to(_place(), copy=True) for value in own]
    for value in sums:
        dist.all_reduce(value)
    return tuple(value.to(mine.device) for value, mine in zip(sums, own, strict=True))


def number_of_all(own: float) -> float:
    """The sum over the processes of a number."""
    return float(total(torch.tensor(float(own), dtype=torch.float64))[0])


def same_everywhere(own: Tensor) -> Tensor:
    """The first process's value."""
    if sharers() == 1:
        return own
    value = own.to(_place(), copy=True).contiguous()
    dist.broadcast(value, 0)
    return value.to(own.device)


def all_of(own: Mapping[str, T]) -> dict[str, T]:
    """The entries of all processes."""
    if sharers() == 1:
        return dict(own)
    parts: list[Any] = [None] * count()
    dist.all_gather_object(parts, dict(own))
    return {name: value for part in parts for name, value in part.items()}


def _place() -> torch.device:
    """Where the processes exchange tensors: NCCL does it on GPUs."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
