"""What the kernels take: the one place that the rewrites ask."""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cpu",)
"""Devices with kernels. A graph on another device is left as it is: a rewritten one would have nothing to run."""
