"""The emulator that runs CUDA kernels on the CPU (tests/emulation): what it promises, and the sweep under it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulation import build as emulation
from emulation.launches import launches

from fi_ops import _build

NATIVE = Path(__file__).parent / "native"
UNCHECKED = [
    Path(__file__).parent / name
    for name in ("test_cuda_unchecked.py", "test_batch_unchecked.py", "test_mla_unchecked.py")
]
SWEEP = Path(__file__).parent / "test_every_op.py"

pytestmark = pytest.mark.skipif(not emulation.supported(), reason="the emulator runs on x86-64")


def _run_program(tmp_path, *sources: Path) -> None:
    """Compile a program of emulated kernels; run it with the threads in several orders."""
    program = tmp_path / "program"
    includes = [f"-I{emulation.HERE / 'include'}", f"-I{_build.CSRC / 'include'}"]
    sources = (*sources, *emulation.runtime_sources())
    command = [_build.compiler()[0], *emulation.FLAGS, *includes, *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True)
    for seed in ("0", "1", "2"):
        run = subprocess.run([program], env={**os.environ, "FI_EMULATION_SEED": seed}, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr


def test_smoke(tmp_path):
    """GEMM by cp.async, ldmatrix and mma; shuffles; the last block's turn; a deadlock found. In several orders of threads."""
    _run_program(tmp_path, NATIVE / "emulation_smoke.cu")


def test_hopper_smoke(tmp_path):
    """Boxes, mbarriers and warpgroup products of all operand kinds, a cluster; missing waits and other mistakes are seen."""
    _run_program(tmp_path, NATIVE / "emulation_sm90_smoke.cu")


def test_mask_bits(tmp_path):
    """The scan of a mask for Hopper's attention kernel."""
    _run_program(tmp_path, NATIVE / "mask_bits.cpp", _build.CSRC / "cuda" / "kernels" / "sm90" / "mask_bits.cu")


def test_batch_work(tmp_path):
    """Which tiles of a batch Hopper's attention kernel takes, and where their keys lie; hostile tables."""
    _run_program(tmp_path, NATIVE / "batch_work.cpp")


def _run_tests(*arguments: str, **env: str) -> None:
    """Tests of this folder in a process of their own, on two cores where pytest-xdist is there."""
    parallel = ["-n", "2"] if importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *parallel, *arguments]
    run = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]


def test_sweep():
    """The CUDA kernels by the registry: numerics in bf16 (and the ops without floats), and every refusal."""
    select = "(test_numerics and (bfloat16 or bool or int)) or test_bad_input"
    _run_tests("--emulate-cuda=sm80", str(SWEEP), "-k", select)


def test_hopper(tmp_path):
    """Every attention kernel for sm_90, with threads, warps and copies in another order. (`make test-emulated` runs more.)"""
    ran = tmp_path / "ran"
    kernels = str(Path(__file__).parent / "test_hopper_kernels.py")
    _run_tests("--emulate-cuda=sm90", kernels, FI_EMULATION_SEED="1", FI_EMULATION_LAUNCHES=str(ran))
    counts = {name: count for name, count in launches(ran).items() if "cuda::sm90::" in name}
    assert counts
    assert not [name for name, count in counts.items() if count == 0]


def test_unchecked_values():
    """Hostile index tensors that nothing refuses: the kernels stay in their tensors' memory."""
    _run_tests("--emulate-cuda=sm80", *map(str, UNCHECKED), FI_EMULATION_CHECK="0")
