"""Which kernels a call spends its time in on the GPU, by torch's profiler: `python -m bench models --device cuda --kernels`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

REPLAYS = 5


@dataclass
class Kernel:
    count: int = 0
    busy_us: float = 0.0
    gap_us: float = 0.0


def print_kernels(title: str, call: Callable[[], object], rewind: Callable[[], object]) -> None:
    """A line for each kernel name: launches a call, its time a launch and a call, and how long the GPU idled before it.

    Of kernels that overlap only what reaches beyond the one before is counted.
    """
    for _ in range(3):
        rewind()
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPLAYS):
            rewind()
            torch.cuda.synchronize()
            call()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    kernels: dict[str, Kernel] = {}
    end = None
    for event in sorted(events, key=lambda event: event.time_range.start):
        row = kernels.setdefault(_short(event.name), Kernel())
        start = event.time_range.start if end is None else max(end, event.time_range.start)
        gap = 0.0 if end is None else start - end
        end = max(start, event.time_range.end)
        row.count += 1
        row.busy_us += end - start
        row.gap_us += gap if gap < 20 else 0.0  # more lies between two replays
    print(f"\n{title}: kernels of one call (mean of {REPLAYS})")
    print("    count   us each  us a call  gaps us  kernel")
    for name, row in sorted(kernels.items(), key=lambda item: -item[1].busy_us):
        each, call_us, gap = row.busy_us / row.count, row.busy_us / REPLAYS, row.gap_us / REPLAYS
        print(f"{row.count / REPLAYS:9.1f} {each:9.2f} {call_us:10.1f} {gap:8.1f}  {name}")
    busy, gaps = (sum(getattr(row, part) for row in kernels.values()) / REPLAYS for part in ("busy_us", "gap_us"))
    print(f"{'':19} {busy:10.1f} {gaps:8.1f}  all", flush=True)


def _short(name: str) -> str:
    """A kernel's name without return type, arguments and anonymous namespaces, cut to what fits on a line."""
    name = re.sub(r"\(anonymous namespace\)::|^void ", "", name)
    return re.sub(r"\(.*\)$", "", name)[:120]
