"""What the kernels take: the one place that the rewrites ask."""

from __future__ import annotations

import torch

from .. import _load

HAS_RELATIVE_OFFSETS = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 13)
"""Inductor takes the offset of an input in its storage off the offset of an `as_strided` of it, as it has to be: generated code
starts from where the input begins. torch 2.11 and 2.12 do not, and address other memory."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def has_kernels(device: torch.device) -> bool:
    """The ops can run there. A graph on any other device is left as it is: rewritten, it would have nothing to run."""
    return _load.available(device.type)


def device_key() -> str:
    """The device types with kernels, for the key of compiled graphs: a graph that was rewritten for a device must not
    come out of the cache where there is no library for it."""
    return ",".join(kind for kind in ("cpu", "cuda") if has_kernels(torch.device(kind)))
