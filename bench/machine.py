"""The machine under the numbers: what it is, and its ceilings, measured in torch between the turns of every case."""

from __future__ import annotations

import functools
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import fi_ops
from fi_ops.library import Cost

from .clock import CudaClock, HostClock, clock_of

GIB = 2**30


def describe(device: str) -> list[str]:
    """What the numbers were taken on, and with what."""
    versions = f"torch {torch.__version__}, fi_ops {fi_ops.__version__}, Python {platform.python_version()}"
    load = f"load average before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    if device == "cpu":
        return [f"{_cpu_model()}, {torch.get_num_threads()} threads, fi_ops ISA {fi_ops.cpu_isa()}; {load}", versions]
    gpu = torch.cuda.get_device_properties(0)
    return [
        f"{gpu.name}, {gpu.multi_processor_count} SMs, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / GIB:.0f} GiB, "
        f"L2 {gpu.L2_cache_size / 2**20:.0f} MiB, driver {_driver()}; host {_cpu_model()}, {load}",
        f"{versions}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}",
    ]


def slug(device: str) -> str:
    """The machine's name in a file's: `nvidia-h100-80gb-hbm3`, `intel-r-xeon-r-platinum-8480c-4-cores`."""
    name = torch.cuda.get_device_name(0) if device == "cuda" else f"{_cpu_model()} {os.cpu_count()} cores"
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


def _cpu_model() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text()
        return next(line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


# ------------------------------------------------------------------------------------------------ ceilings


@dataclass(frozen=True)
class Probe:
    """A job that does nothing but read memory, or multiply matrices: `units` bytes or floating-point operations."""

    name: str
    fn: Callable[[], object]
    units: int


def _reads(device: str) -> list[Probe]:
    """Ways to read much more memory than any cache holds; which one torch does best differs from machine to machine."""
    if device == "cpu":
        x = torch.ones(GIB // 16)
        return [Probe("sum", x.sum, x.nbytes)]
    x, vector = torch.randn(GIB // 4, device=device), torch.randn(8192, device=device).bfloat16()
    rows, other = torch.randn(GIB // 2 // 8192, 8192, device=device).bfloat16(), torch.empty_like(x)
    return [
        Probe("sum", x.sum, x.nbytes),
        Probe("amax", x.amax, x.nbytes),
        Probe("sum of rows", lambda: x.view(-1, 8192).sum(1), x.nbytes),
        Probe("matrix times vector", lambda: rows @ vector, rows.nbytes),
        Probe("copy, both ways counted", lambda: other.copy_(x), 2 * x.nbytes),
    ]


def _products(device: str, dtype: torch.dtype) -> list[Probe]:
    """On the CPU float16 stands by float32's: torch multiplies halves on one scalar thread where there is no AVX512-FP16."""
    if device == "cpu":
        dtype = torch.float32 if dtype == torch.float16 else dtype
        m, n, k = 1024, 2048, 2048
    else:
        m = n = k = 4096 if dtype == torch.float32 else 8192
    a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
    return [Probe(f"{m} x {n} x {k}", lambda: a @ b, 2 * m * n * k)]


@functools.cache
def _best_probe(device: str, dtype: torch.dtype | None) -> Probe:
    """The fastest way to read, or to multiply matrices of `dtype`, by the median of five."""
    clock = clock_of(device)
    probes = _reads(device) if dtype is None else _products(device, dtype)
    if len(probes) == 1:
        return probes[0]
    return max(probes, key=lambda p: p.units / statistics.median(clock.seconds(p.fn) for _ in range(5)))


class Ceilings:
    """What the machine does at the moment: bytes read and floating-point operations a second, probed between the turns.

    A shared machine's bus gives half as much from one minute to the next, so a ceiling measured once says little.
    """

    def __init__(self, device: str, dtype: torch.dtype, clock: HostClock | CudaClock):
        self.clock = clock
        self.probes = {"read": _best_probe(device, None), "gemm": _best_probe(device, dtype)}
        self.times: dict[str, list[float]] = {}
        for name, probe in self.probes.items():
            probe.fn()
            self.times[name] = [clock.seconds(probe.fn)]

    def probe(self, name: str) -> None:
        self.times[name].append(self.clock.seconds(self.probes[name].fn))

    def rate(self, name: str) -> float:
        """Units a second, by the median probe."""
        return self.probes[name].units / statistics.median(self.times[name])

    def least(self, cost: Cost) -> tuple[float, float]:
        """The seconds that its products take at the ceiling, and those that its bytes take."""
        return cost.flops / self.rate("gemm"), cost.bytes / self.rate("read")

    def bound(self, cost: Cost) -> tuple[str, float]:
        """(which ceiling bounds the job, its least seconds)."""
        by_flops, by_bytes = self.least(cost)
        return ("read", by_bytes) if by_bytes >= by_flops else ("gemm", by_flops)

    def __str__(self) -> str:
        read, gemm = self.rate("read") / 1e9, self.rate("gemm") / 1e9
        return (
            f"read {read:.1f} GB/s ({self.probes['read'].name}), GEMM {gemm:.0f} GFLOP/s ({self.probes['gemm'].name})"
        )
