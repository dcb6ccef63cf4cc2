"""Tests that ask for a GPU, run in the emulator: what they put on "cuda" stays on the CPU, where the emulated kernels are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch.overrides import TorchFunctionMode

from .build import capability


class CpuForCuda(TorchFunctionMode):
    """Calls of torch get the device "cpu" where they are given "cuda"."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda:
            return args[0]
        kwargs = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        return func(*map(_on_cpu, args), **kwargs)


def _on_cpu(value):
    is_cuda = isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == "cuda"
    return "cpu" if is_cuda else value


def _needs_gpu(*_args, **_kwargs):
    pytest.skip("streams, graphs and compiled code need a CUDA device")


@contextlib.contextmanager
def emulated_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is run inside takes the emulated device for a GPU, and skips the test where that has no twin."""
    monkeypatch.setenv("FI_EMULATION_CHECK", "0")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: divmod(capability(), 10))
    for name in ("CUDAGraph", "Stream", "current_stream", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, _needs_gpu)
    monkeypatch.setattr(torch, "compile", _needs_gpu)
    monkeypatch.setattr(torch, "set_flush_denormal", lambda _: True)  # of the processor, not of a GPU
    with CpuForCuda():
        yield
