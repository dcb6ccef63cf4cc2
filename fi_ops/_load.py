"""Find or build a device's native library and load it, once a process; one clear error when it can't be had.

Until a library is loaded, a stub stands behind every op (registered as CompositeExplicitAutograd, which any kernel for a
device outranks): the first call on a CPU tensor loads the library, whose own registrations then take over, and repeats
the call. After that no Python runs in a call.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

from . import _build

_lock = threading.RLock()
_loaded: dict[str, Path] = {}


def library_path(device: str = "cpu") -> Path | None:
    """The file of the loaded library, or None when none is loaded yet."""
    return _loaded.get(device)


def load(device: str = "cpu") -> Path:
    """Load the native library of `device`, building it first where needed; a second call does nothing.

    Raises:
        RuntimeError: no library can be had; the message names what is missing and what to do.
    """
    if device != "cpu":
        raise RuntimeError(
            f"fi_ops has no kernels for device type '{device}' in this version (see the support matrix in README.md); "
            f"move the tensors to the CPU or use stock torch for this call"
        )
    with _lock:
        if device not in _loaded:
            path = _build.prebuilt_library(device) or _build.build_cpu()
            torch.ops.load_library(str(path))
            _loaded[device] = path
        return _loaded[device]


def cpu_isa() -> str:
    """The ISA level that the CPU kernels run at: baseline, avx2, avx512, avx512_bf16 or amx. Loads the library.

    `FI_OPS_CPU_ISA` lowers it for a process. Raises RuntimeError when that variable names no level.
    """
    function = ctypes.CDLL(str(load("cpu"))).fi_ops_cpu_isa
    function.restype = ctypes.c_char_p
    level = function()
    if level is None:
        names = ", ".join(isa.name for isa in _build.ISA_LEVELS)
        raise RuntimeError(f"fi_ops: FI_OPS_CPU_ISA must be one of {names}; unset it for the best level")
    return level.decode()


def make_stub(name: str) -> Callable:
    """The kernel behind op `name` on devices whose library isn't loaded: load it, then call the op again."""

    def stub(*args, **kwargs):
        device = next(leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        if device in _loaded:  # the library is there but has no such op: a bug in the package, not a user's error
            raise RuntimeError(f"fi::{name}: {_loaded[device]} has no {device} kernel for this op")
        load(device)
        return getattr(torch.ops.fi, name)(*args, **kwargs)

    return stub
