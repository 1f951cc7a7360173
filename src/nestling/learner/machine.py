"""What the same bits depend on beside the numbers that went in: nestling, torch, the processor, the threads."""

import contextlib
import platform
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from nestling import __version__


def machine() -> dict[str, Any]:
    """What a bit-for-bit continuation depends on."""
    return {
        "nestling": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def machine_differences(then: Mapping[str, Any]) -> list[str]:
    """What differs between a machine that was written down and this one, in words; what was not written down may."""
    now = machine()
    names = {**now, **then}
    told = {name: (then.get(name, "not known"), now.get(name, "not known")) for name in names}
    return [f"{name}: {was} then, {found} now" for name, (was, found) in told.items() if was != found]


@contextlib.contextmanager
def flushing() -> Iterator[None]:
    """Denormal numbers are flushed inside, whatever the process does outside: a life has the same bits in both."""
    smallest = torch.finfo(torch.float32).tiny
    before = float(torch.tensor(smallest) * 0.5) == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
