"""Architectures other than x86-64 compile the baseline level and work: here aarch64, by cross compiler and emulator."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from fi_ops import _build

DRIVER = Path(__file__).resolve().parent / "native" / "portable_smoke.cpp"
CROSS = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64")
FLAGS = ["-I", str(_build.CSRC / "include"), "-I", str(_build.CSRC), *_build.COMMON_FLAGS]
BASELINE = ["-DFI_ISA_MASK=1", "-DFI_ISA=baseline", "-DFI_ISA_LEVEL=0"]


def build_smoke(compiler: str, folder: Path) -> Path:
    """The smoke driver linked with every kernel file at the baseline level, statically."""
    kernels = sorted((_build.CSRC / "cpu" / "kernels").glob("*.cpp"))
    objects = []
    for source in kernels:
        objects.append(str(folder / f"{source.stem}.o"))
        command = [compiler, *FLAGS, "-O1", *BASELINE, "-c", str(source), "-o", objects[-1]]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[:4000]
    program = folder / "smoke"
    command = [
        compiler,
        *FLAGS,
        "-O1",
        *BASELINE,
        str(DRIVER),
        str(_build.CSRC / "cpu" / "isa.cpp"),
        *objects,
        "-static",
        "-o",
        str(program),
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[:4000]
    return program


def test_kernels_run_without_torch(tmp_path):
    """The core and the kernels need no torch: compiled alone, at the baseline level, they compute the same."""
    program = build_smoke(_build.compiler()[0], tmp_path)
    assert subprocess.run([program], capture_output=True, text=True).stdout == "ok\n"


@pytest.mark.skipif(not (CROSS and EMULATOR), reason="needs g++-aarch64-linux-gnu and qemu-user")
def test_aarch64(tmp_path):
    program = build_smoke(CROSS, tmp_path)
    assert subprocess.run([EMULATOR, program], capture_output=True, text=True).stdout == "ok\n"


@pytest.mark.skipif(not CROSS, reason="needs g++-aarch64-linux-gnu")
def test_bindings_compile_for_aarch64(tmp_path):
    for source in sorted([*(_build.CSRC / "binding").glob("*.cpp"), *(_build.CSRC / "cpu").glob("*.cpp")]):
        torch_flags = [
            f"-DTORCH_TARGET_VERSION={_build.TORCH_TARGET_VERSION}",
            "-isystem",
            str(_build.torch_root() / "include"),
        ]
        command = [CROSS, *FLAGS, "-O0", "-fsyntax-only", "-DFI_ISA_MASK=1", *torch_flags, str(source)]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[:4000]
