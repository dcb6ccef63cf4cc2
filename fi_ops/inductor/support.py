"""What the kernels take: the one place that the rewrites ask."""

from __future__ import annotations

import torch

from .. import _load

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def has_kernels(device: torch.device) -> bool:
    """The ops can run there. A graph on any other device is left as it is: rewritten, it would have nothing to run."""
    return _load.available(device.type)


def device_key() -> str:
    """The device types with kernels, for the key of compiled graphs: a graph that was rewritten for a device must not
    come out of the cache where there is no library for it."""
    return ",".join(kind for kind in ("cpu", "cuda") if has_kernels(torch.device(kind)))
