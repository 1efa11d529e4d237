"""Torch's global random generator, lent to one thread at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

__all__ = ["lent_generator"]

#: Held by the thread that seeds torch's global generator and draws from it. A thread may take it several times.
_LOCK = threading.RLock()


@contextlib.contextmanager
def lent_generator() -> Iterator[None]:
    """Lend torch's global generator to this thread, with gradients switched on, and restore all of it afterwards.

    Initial weights and dropout draw from the one generator of the process: a thread that seeds it while another one
    trains would change the other's numbers. ``no_grad`` and ``inference_mode`` of the caller do not reach the block.

    >>> torch.manual_seed(0) and None
    >>> with lent_generator():
    ...     _ = torch.manual_seed(5), torch.rand(3)
    >>> torch.initial_seed()
    0
    """
    with _LOCK, torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        yield
