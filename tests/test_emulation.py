"""The emulator that runs CUDA kernels on the CPU (tests/emulation): what it promises, and the sweep under it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from emulation import build as emulation

from fi_ops import _build

NATIVE = Path(__file__).parent / "native"

pytestmark = pytest.mark.skipif(not emulation.supported(), reason="the emulator runs on x86-64")


def test_smoke(tmp_path):
    """GEMM by cp.async, ldmatrix and mma; shuffles; the last block's turn; a deadlock found. In several orders of threads."""
    program = tmp_path / "smoke"
    includes = [f"-I{emulation.HERE / 'include'}", f"-I{_build.CSRC / 'include'}"]
    sources = [NATIVE / "emulation_smoke.cu", emulation.HERE / "block.cpp"]
    command = [_build.compiler()[0], *emulation.FLAGS, *includes, *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True)
    for seed in ("0", "1", "2"):
        run = subprocess.run([program], env={**os.environ, "FI_EMULATION_SEED": seed}, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
