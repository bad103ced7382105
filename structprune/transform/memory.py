"""Large blocks of memory, while a model is rebuilt and checked: given back to the system at once, or kept for the next tensor of that size.

glibc gives back what is larger than a threshold, which it raises to 32 MiB by itself. What it keeps leaves holes that the next tensor, a little
larger, does not fit into: DeiT-Tiny's peak is 2.8 times its own size, and 1.4 times where all goes back. What it gives back comes again
full of zeros, page by page, which takes as long as the arithmetic: checking a video Swin took 18 seconds, and takes 9 where blocks are kept.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_LEAST, _MOST = 128 << 10, 2 << 20  # bytes; smaller blocks cost time, larger ones memory
_SHARE = 256  # a block is worth its time if it is more than this part of the model
_KEPT = 256 << 20  # bytes; larger blocks are weights
_GLIBC_AT_MOST = 32 << 20
_HEAVY = 10_000_000_000  # multiply-accumulates


@contextmanager
def freed_or_kept(tensors: Iterable[Tensor], work: float) -> Iterator[None]:
    """Where there is little work, blocks go back to the system at once; where there is much, at the end.

    tensors: those of the model; the larger they are, the larger the blocks that are worth giving back. work: its multiply-accumulates.
    Does nothing where the C library is not glibc, or the user has set the threshold. Afterwards that stands where glibc itself would have moved
    it after the first large tensor.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" and "MALLOC_MMAP_THRESHOLD_" not in os.environ else None
    if libc is None or not hasattr(libc, "mallopt"):
        yield
        return

    def set_threshold(size: int) -> None:
        libc.mallopt(_MMAP_THRESHOLD, size)
        libc.mallopt(_TRIM_THRESHOLD, 2 * size)

    set_threshold(_KEPT if work > _HEAVY else min(_MOST, max(_LEAST, sum(t.numel() * t.element_size() for t in tensors) // _SHARE)))
    try:
        yield
    finally:
        set_threshold(_GLIBC_AT_MOST)
        libc.malloc_trim(0)
