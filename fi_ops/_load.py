"""Find or build a device's native library and load it, once a process; one clear error when it can't be had.

Until a library is loaded, a stub stands behind every op (registered as CompositeExplicitAutograd, which any kernel for a
device outranks): the first call on a device's tensors loads its library, whose own registrations then take over, and
repeats the call. After that no Python runs in a call.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

from . import _build, _build_cuda

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
    if device not in _finders:
        raise RuntimeError(
            f"fi_ops has no kernels for device type '{device}' in this version (see the support matrix in README.md); "
            f"move the tensors to the CPU or use stock torch for this call"
        )
    with _lock:
        if device not in _loaded:
            path = _finders[device]()
            torch.ops.load_library(str(path))
            _loaded[device] = path
        return _loaded[device]


def available(device: str) -> bool:
    """Whether `load(device)` can be expected to succeed. Compiles nothing: asks for a card, a library or a compiler."""
    return device in _loaded or (device in _finders and _obtainable(device))


@functools.cache
def _obtainable(device: str) -> bool:
    try:
        if device == "cuda":
            return _build_cuda.prebuilt_library(_cuda_cards()) is not None or bool(_build_cuda.nvcc())
        return bool(_build.prebuilt_libraries(device) or _build.compiler())
    except RuntimeError:
        return False


def _cpu_library() -> Path:
    prebuilt = _build.prebuilt_libraries("cpu")
    return prebuilt[0] if prebuilt else _build.build_cpu()


def _cuda_library() -> Path:
    cards = _cuda_cards()
    # Built here, it is for the cards of this machine alone: half the time to wait before the first call.
    return _build_cuda.prebuilt_library(cards) or _build_cuda.build_cuda(archs=_archs_to_build(cards))


def _archs_to_build(cards: tuple[_build_cuda.Capability, ...]) -> tuple[_build_cuda.CudaArch, ...]:
    return _build_cuda.selected_archs() if os.environ.get("FI_OPS_CUDA_ARCHS") else _build_cuda.archs_for(cards)


def _cuda_cards() -> tuple[_build_cuda.Capability, ...]:
    """The compute capabilities of the cards that torch sees; RuntimeError with one line where none can be used."""
    if torch.version.cuda is None:
        raise RuntimeError(
            f"fi_ops: torch {torch.__version__} is not a CUDA build; install one that is. {_build_cuda.STILL_WORKS}"
        )
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"fi_ops: no CUDA device can be used (torch.cuda.is_available() is False): no GPU, no driver, or "
            f"CUDA_VISIBLE_DEVICES hides it; see what nvidia-smi says. {_build_cuda.STILL_WORKS}"
        )
    cards = tuple(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    usable = tuple(card for card in cards if _build_cuda.archs_for([card]))
    if not usable:
        raise RuntimeError(
            f"fi_ops: the CUDA kernels need a GPU of compute capability 8.0 or newer, got "
            f"{', '.join(f'{major}.{minor}' for major, minor in cards)}. {_build_cuda.STILL_WORKS}"
        )
    return usable


_finders: dict[str, Callable[[], Path]] = {"cpu": _cpu_library, "cuda": _cuda_library}


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
