"""The CUDA side of the builder and loader. Where nvcc is there, all CUDA code is compiled (no GPU is needed); none is run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fi_ops import _build, _build_cuda, _build_report, _load
from fi_ops import build as build_command

ROOT = Path(__file__).resolve().parent.parent


def _nvcc_is_there() -> bool:
    try:
        return bool(_build_cuda.nvcc())
    except _build.BuildError:
        return False


needs_nvcc = pytest.mark.skipif(not _nvcc_is_there(), reason="no nvcc here: CUDA code is not compiled")

KERNEL = """
#include "fi/cuda/launch.h"
namespace fi::cuda {
__global__ void some_kernel(float* x, int n) { BODY }
void launch_some_kernel(const Gpu& gpu) {
  launch_with<some_kernel, 96>(gpu, dim3(1), dim3(32), /*overlap=*/false, (float*)nullptr, 1);
}
}  // namespace fi::cuda
"""
LARGE_FRAME = KERNEL.replace(
    "BODY",
    """
  float local[512];
  for (int i = 0; i < 512; ++i) local[i] = x[i * n];
  for (int i = 0; i < n; ++i) local[(i * n) & 511] += local[(i + n) & 511];
  x[0] = local[n & 511];
""",
)


@pytest.fixture
def one_kernel_file(tmp_path, monkeypatch):
    """A csrc/ of the headers, cuda/runtime.cpp and one kernel file, and a private cache: builds take seconds."""
    csrc = tmp_path / "csrc"
    shutil.copytree(_build.CSRC, csrc)
    for source in [*csrc.rglob("*.cpp"), *csrc.rglob("*.cu")]:
        if source.name != "runtime.cpp":
            source.unlink()
    kernel = csrc / "cuda" / "kernels" / "some_kernel.cu"
    kernel.parent.mkdir(exist_ok=True)
    kernel.write_text(LARGE_FRAME)
    monkeypatch.setattr(_build, "CSRC", csrc)
    monkeypatch.setenv("FI_OPS_CACHE_DIR", str(tmp_path / "cache"))
    _build._closure.cache_clear()
    yield kernel
    _build._closure.cache_clear()


@needs_nvcc
def test_builds_once_and_reports(one_kernel_file, monkeypatch):
    monkeypatch.setenv("FI_OPS_CUDA_ARCHS", "sm_80")
    lines: list[str] = []
    first = _build_cuda.build_cuda(progress=lines.append)
    assert first.is_file() and any("built the CUDA kernels" in line for line in lines)
    slowest = next(line for line in lines if "slowest files: some_kernel.cu" in line)
    assert float(slowest.split()[-2]) > 0.1, "seconds of the compiler's own time"
    note = next(line for line in lines if "some_kernel.cu (sm_80)" in line)
    assert "has a stack frame (2048 bytes of stack" in note
    lines.clear()
    assert _build_cuda.build_cuda(progress=lines.append) == first and not lines, "a second build must do nothing"

    plan = _build_cuda.cuda_plan()
    (_, heading, row) = _build_report.kernel_lines(plan, plan.jobs)
    cells = dict(zip(re.split("  +", heading), row.split(), strict=False))
    assert (cells["stack B"], cells["kernel"]) == ("2048", "some_kernel") and row.startswith("sm_80 "), row
    assert cells["dynamic shared B"] == "96", row

    one_kernel_file.write_text(KERNEL.replace("BODY", "x[0] += n;"))
    _build._closure.cache_clear()
    assert _build_cuda.build_cuda(progress=lines.append) != first
    assert not any("some_kernel.cu (sm_80)" in line for line in lines)


@needs_nvcc
def test_the_command_prints_every_kernel(one_kernel_file, monkeypatch, capsys):
    """What it compiles, and with --report what was compiled before too; the path alone is on stdout."""
    monkeypatch.setenv("FI_OPS_CUDA_ARCHS", "sm_80")
    printed = []
    for arguments in ([], [], ["--report"]):
        assert build_command.main(["--device", "cuda", *arguments]) == 0
        out, err = capsys.readouterr()
        assert len(out.splitlines()) == 1 and out.strip().endswith(".so")
        printed.append([line for line in err.splitlines() if line.endswith("  some_kernel")])
    assert len(printed[0]) == 1 and not printed[1] and printed[2] == printed[0]


@needs_nvcc
def test_compiler_errors_are_shown(one_kernel_file):
    one_kernel_file.write_text("#error something is wrong here\n")
    _build._closure.cache_clear()
    with pytest.raises(_build.BuildError, match="something is wrong here"):
        _build_cuda.build_cuda(progress=lambda line: None)


def allowed_spill(kernel: str) -> int:
    """Bytes stored a thread: ptxas spills a few registers to fit one more block. Samplers that keep a part of a row on chip
    (large batches) hold more values across passes: measured faster than what keeps all and does not spill
    (docs/kernels/sampling_cuda.md)."""
    keeps_a_part = "4KeepE1E" in kernel
    return 96 if keeps_a_part else 16


# Of one core, a file and architecture; the slowest take 15. The compiler's own time, so that other load hardly counts.
COMPILE_SECONDS = 45


@needs_nvcc
def test_whole_library():
    """Every CUDA source compiles for every architecture in reasonable time, no kernel spills to speak of, and the library has
    every op."""
    library = _build_cuda.build_cuda()
    plan = _build_cuda.cuda_plan()
    uses = _build_report.plan_uses(plan)
    spills = [use for use in uses if use.spill_stores > allowed_spill(use.kernel)]
    assert uses and not spills, "\n".join(map(str, spills))
    taken = {job.object_name: (_build.cpu_seconds(plan.object_path(job)) or 0.0, job.label) for job in plan.jobs}
    slow = {name: took for name, (took, label) in taken.items() if took > COMPILE_SECONDS * (label.count("+") + 1)}
    assert not slow, f"these take too long to compile; spread their instantiations over files: {slow}"
    script = f"""
import torch, fi_ops
torch.ops.load_library({str(library)!r})
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(*(name for name in fi_ops.library.SPECS if not has(f"fi::{{name}}", "CUDA")))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "", f"no CUDA kernel for: {run.stdout}"


def test_ptxas_report_is_read():
    log = """
ptxas info    : 24 bytes gmem
ptxas info    : Compiling entry function '_Z1av' for 'sm_80'
ptxas info    : Function properties for _Z1av
    40 bytes stack frame, 36 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 40 bytes cumulative stack size, 376 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bv' for 'sm_90a'
ptxas info    : Function properties for _Z1bv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 4 registers, used 0 barriers, 8324 bytes smem, 588 bytes cmem[0]
ptxas info    : Compile time = 277.420 ms
ptxas info    : Function properties for _Z6calledv
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
"""
    a, b = _build_report.kernel_uses(Path("x.cu"), log)
    assert (a.kernel, a.arch, a.registers, a.stack, a.spill_stores, a.spill_loads) == (
        "_Z1av",
        "sm_80",
        255,
        40,
        36,
        32,
    )
    assert (b.kernel, b.arch, b.registers, b.shared, b.ptxas_seconds) == ("_Z1bv", "sm_90a", 4, 8324, 0.27742)
    assert a.spills and a.shared == 0 and (b.stack, b.spill_stores, b.called_spills) == (0, 0, 12)
    with pytest.raises(ValueError, match=r"x\.cu: ptxas says nothing of _Z1cv for sm_80"):
        _build_report.kernel_uses(Path("x.cu"), "Compiling entry function '_Z1cv' for 'sm_80'\nptxas fatal\n")


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt")
def test_kernels_have_readable_names():
    names = [
        "_ZN2fi4cuda44_GLOBAL__N__a6a0663e_11_sampling_cu_2d73e84a6sampleINS_3f16ELb0EEEvNS_14SamplingParamsEi",
        "_ZN2fi4cuda18batch_tiles_kernelINS0_16BatchTilesConfigINS_4bf16ELi192ELi128ELb1ELNS0_13BatchFeaturesE2EEEEEvPi",
        "some_kernel",
    ]
    assert _build_report.readable(names) == [
        "sample<f16, false>",
        "batch_tiles_kernel<BatchTilesConfig<bf16, 192, 128, true, (BatchFeatures)2>>",
        "some_kernel",
    ]


def test_dynamic_shared_memory_is_read():
    symbols = (
        "0000 t void fi::cuda::launch_with<&(void fi::cuda::mla::part<fi::f16, (fi::Fp8)0, 3ul>(fi::P)), 512ul, fi::P&>(dim3)\n"
        "0010 t void fi::cuda::launch_clusters_with<&fi::cuda::(anonymous namespace)::chain, 64ul, int>(dim3) [clone .isra.0]\n"
        "0020 t void fi::cuda::launch<fi::P, fi::P const&>(fi::cuda::Gpu const&, void (*)(fi::P), dim3, dim3, unsigned long)\n"
    )
    assert _build_report.dynamic_shared(symbols) == {"mla::part<f16, (Fp8)0, 3ul>": 512, "chain": 64}


def test_compile_times_are_read(tmp_path):
    assert _build.cpu_seconds(tmp_path / "a.o") is None
    (tmp_path / "a.o.times").write_text("0m0.000000s 0m0.010000s\n1m12.500000s 0m1.250000s\n")
    assert _build.cpu_seconds(tmp_path / "a.o") == 73.75


def test_arch_table():
    def names(*cards):
        return [arch.name for arch in _build_cuda.archs_for(cards)]

    assert names((8, 0)) == names((8, 9)) == names((12, 0)) == ["sm_80"]
    assert names((9, 0)) == ["sm_90a"]
    assert names((9, 0), (8, 6)) == ["sm_80", "sm_90a"]
    assert names((7, 5)) == []


def test_arch_variable_is_checked(monkeypatch):
    monkeypatch.setenv("FI_OPS_CUDA_ARCHS", "sm_90a")
    assert [arch.name for arch in _build_cuda.selected_archs()] == ["sm_90a"]
    monkeypatch.setenv("FI_OPS_CUDA_ARCHS", "sm_80,sm_70")
    with pytest.raises(_build.BuildError, match="has sm_70; it takes sm_80, sm_90a"):
        _build_cuda.selected_archs()


def test_prebuilt_library_is_chosen_by_its_archs(tmp_path, monkeypatch):
    monkeypatch.setattr(_build, "PREBUILT", tmp_path)
    assert _build_cuda.prebuilt_library([(9, 0)]) is None
    hopper = tmp_path / _build.prebuilt_name("cuda", _build_cuda.prebuilt_variant(_build_cuda.archs_for([(9, 0)])))
    hopper.touch()
    assert _build_cuda.prebuilt_library([(9, 0)]) == hopper
    assert _build_cuda.prebuilt_library([(8, 0)]) is None and _build_cuda.prebuilt_library([(9, 0), (8, 0)]) is None
    both = tmp_path / _build.prebuilt_name("cuda", _build_cuda.prebuilt_variant(_build_cuda.CUDA_ARCHS))
    both.touch()
    assert _build_cuda.prebuilt_library([(9, 0), (8, 0)]) == both
    both.rename(tmp_path / both.name.replace(_build.source_hash(), "of-other-sources"))
    assert _build_cuda.prebuilt_library([(8, 0)]) is None


def test_out_makes_a_prebuilt_library(tmp_path, monkeypatch):
    library = tmp_path / "library.so"
    library.write_text("a library")
    monkeypatch.setattr(_build_cuda, "build_cuda", lambda **kwargs: library)
    monkeypatch.setattr(_build, "PREBUILT", tmp_path / "_lib")
    assert build_command.main(["--device", "cuda", "--out", str(tmp_path / "_lib")]) == 0
    found = _build_cuda.prebuilt_library([(8, 0), (9, 0)])
    assert found is not None and found.read_text() == "a library"


# ---------------------------------------------------------------------------------------------------- what is said


REST = "CPU ops keep working, and so does stock torch"


@pytest.fixture
def a_gpu(monkeypatch):
    """torch as it is on a machine with one H100; the library is neither prebuilt nor loaded."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, 0))
    monkeypatch.setattr(_build, "prebuilt_libraries", lambda device: [])
    monkeypatch.setattr(_load, "_loaded", {})
    for cached in (_load._obtainable, _build_cuda.nvcc):
        cached.cache_clear()
    yield
    for cached in (_load._obtainable, _build_cuda.nvcc):
        cached.cache_clear()


def refusal() -> str:
    """What load("cuda") says; it must be one line, and say what still works."""
    assert not _load.available("cuda")
    with pytest.raises(RuntimeError) as caught:
        _load.load("cuda")
    text = str(caught.value)
    assert "\n" not in text and text.startswith("fi_ops: ") and text.endswith(REST)
    return text


def test_missing_nvcc_says_so(a_gpu, monkeypatch):
    monkeypatch.setattr(_build_cuda.shutil, "which", lambda name: None)
    assert "need nvcc" in refusal()


def test_old_nvcc_says_so(a_gpu, monkeypatch, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(nvcc))
    assert "CUDA toolkit 12.4 or newer" in refusal() and "is of 11.8" in refusal()


def test_missing_gpu_says_so(a_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device can be used" in refusal()


def test_cpu_build_of_torch_says_so(a_gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is not a CUDA build" in refusal()


def test_old_gpu_says_so(a_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (7, 5))
    assert "compute capability 8.0 or newer, got 7.5" in refusal()


@needs_nvcc
def test_first_use_builds_for_this_machines_cards(a_gpu, monkeypatch):
    assert _load.available("cuda")
    asked = []
    monkeypatch.setattr(_build_cuda, "build_cuda", lambda archs: asked.append([arch.name for arch in archs]))
    _load._cuda_library()
    monkeypatch.setenv("FI_OPS_CUDA_ARCHS", "sm_80")
    _load._cuda_library()
    assert asked == [["sm_90a"], ["sm_80"]]


def test_other_devices_are_refused():
    with pytest.raises(RuntimeError, match="no kernels for device type 'xpu'"):
        _load.load("xpu")
    assert not _load.available("xpu")
