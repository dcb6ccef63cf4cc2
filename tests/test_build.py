"""The builder and loader: what is cached, what is rebuilt, what is said when something is missing."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import fi_ops
from fi_ops import _build, _load

ROOT = Path(__file__).resolve().parent.parent


def run_python(script: str, **env) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **env}, timeout=600, cwd=ROOT
    )


SMALL_SOURCES = ("isa", "norm", "runtime")


@pytest.fixture
def small_tree(tmp_path, monkeypatch):
    """A private copy of csrc/ with one family only, and a private cache: builds take seconds."""
    csrc = tmp_path / "csrc"
    shutil.copytree(_build.CSRC, csrc)
    for source in [*csrc.rglob("*.cpp"), *csrc.rglob("*.cu")]:
        if source.stem not in SMALL_SOURCES:
            source.unlink()
    monkeypatch.setattr(_build, "CSRC", csrc)
    monkeypatch.setenv("FI_OPS_CACHE_DIR", str(tmp_path / "cache"))
    _build._closure.cache_clear()
    yield csrc
    _build._closure.cache_clear()


def objects() -> set[str]:
    return {p.name for p in (_build.cache_root() / "obj").glob("*.o")}


def test_builds_once_and_rebuilds_only_what_changed(small_tree):
    lines: list[str] = []
    first = _build.build_cpu(progress=lines.append)
    assert first.is_file() and any("built the CPU kernels" in line for line in lines)
    lines.clear()
    assert _build.build_cpu(progress=lines.append) == first and not lines, "a second build must do nothing"

    before = objects()
    kernel = small_tree / "cpu" / "kernels" / "norm.cpp"
    kernel.write_text(kernel.read_text() + "\n// edited\n")
    _build._closure.cache_clear()
    second = _build.build_cpu(progress=lines.append)
    new = objects() - before
    assert second != first
    assert {name.split(".")[0] for name in new} == {"norm"} and not any(".binding." in name for name in new)
    assert len(new) == len(_build.isa_levels())

    binding_header = small_tree / "binding" / "check.h"
    binding_header.write_text(binding_header.read_text() + "\n// edited\n")
    _build._closure.cache_clear()
    before = objects()
    _build.build_cpu(progress=lines.append)
    assert all(".binding." in name for name in objects() - before), "a header rebuilds only the files that include it"


def test_cache_is_private(small_tree, tmp_path, monkeypatch):
    root = _build.cache_root()
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    root.chmod(0o777)
    with pytest.raises(_build.BuildError, match="writable by you alone"):
        _build.cache_root()


def test_concurrent_processes_build_once(small_tree, tmp_path):
    script = (
        "from pathlib import Path; from fi_ops import _build; "
        f"_build.CSRC = Path({str(small_tree)!r}); print(_build.build_cpu())"
    )
    command = [sys.executable, "-c", script]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(3)
    ]
    outputs = [p.communicate(timeout=600) for p in processes]
    assert all(p.returncode == 0 for p in processes), outputs
    assert len({out for out, _ in outputs}) == 1
    assert sum("built the CPU kernels" in err for _, err in outputs) == 1, "exactly one process builds"
    leftovers = [p.name for p in (_build.cache_root() / "lib").iterdir() if not p.name.startswith("libfi_ops")]
    assert not leftovers


def test_missing_compiler_says_so(small_tree, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    _build.compiler.cache_clear()
    try:
        with pytest.raises(_build.BuildError, match=r"need a C\+\+20 compiler .*`apt install g\+\+`"):
            _build.build_cpu()
    finally:
        _build.compiler.cache_clear()


def test_missing_ninja_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(_build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(_build.BuildError, match="pip install ninja"):
        _build.ninja_command()


def test_compiler_errors_are_shown(small_tree):
    (small_tree / "cpu" / "norm.cpp").write_text("#error something is wrong here\n")
    _build._closure.cache_clear()
    with pytest.raises(_build.BuildError, match="something is wrong here"):
        _build.build_cpu(progress=lambda line: None)


def test_ops_exist_without_a_compiler(tmp_path):
    """Schemas and fakes need no compiler; a call says what is missing; nothing is built by importing."""
    script = """
import sys, torch, fi_ops
from torch._subclasses.fake_tensor import FakeTensorMode
assert torch.ops.fi.rmsnorm.default._schema.name == "fi::rmsnorm"
with FakeTensorMode():
    assert torch.ops.fi.rmsnorm(torch.empty(3, 8), torch.empty(8)).shape == (3, 8)
try:
    torch.ops.fi.rmsnorm(torch.ones(3, 8), torch.ones(8))
except RuntimeError as e:
    print("REFUSED", e)
"""
    run = run_python(script, PATH=str(tmp_path), CXX="", FI_OPS_CACHE_DIR=str(tmp_path / "cache"))
    assert run.returncode == 0, run.stderr
    assert "REFUSED" in run.stdout and "C++20 compiler" in run.stdout
    assert not list((tmp_path / "cache").rglob("*.so")) if (tmp_path / "cache").exists() else True


def test_import_is_light():
    """Under 0.3 s on top of torch (best of three), no Inductor, no library loaded, no torch configuration touched."""
    script = """
import time, sys, torch, torch.utils._pytree
before = torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()
start = time.perf_counter()
import fi_ops
print(time.perf_counter() - start)
assert before == (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype())
assert "torch._inductor" not in sys.modules and "transformers" not in sys.modules
assert fi_ops._load.library_path() is None
"""
    times = []
    for _ in range(3):
        run = run_python(script)
        assert run.returncode == 0, run.stderr
        times.append(float(run.stdout))
    assert min(times) < 0.3, f"import fi_ops took {min(times):.2f} s"


def test_no_module_hides_one_of_python():
    """The build backend is found with fi_ops/ on the path, so `fi_ops/_random.py` would be Python's own `_random`."""
    names = {path.stem for path in (Path(fi_ops.__file__).parent).iterdir()}
    assert not names & sys.stdlib_module_names


def test_isa_variable_is_checked():
    script = "import torch, fi_ops; print(fi_ops.cpu_isa()); torch.ops.fi.rmsnorm(torch.ones(2, 8), torch.ones(8))"
    assert run_python(script, FI_OPS_CPU_ISA="baseline").stdout.strip() == "baseline"
    wrong = run_python(script, FI_OPS_CPU_ISA="avx1024")
    assert wrong.returncode != 0 and "FI_OPS_CPU_ISA must be one of baseline, avx2" in wrong.stderr


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")
def test_no_symbol_of_an_isa_file_can_replace_another():
    """An inline function compiled with AVX-512 must not be what the linker keeps for the baseline (illegal instruction).

    So objects compiled for a level define weak symbols only inside that level's own namespace.
    """
    _load.load("cpu")
    root = _build.cache_root()
    checked = 0
    for job in _build.cpu_jobs():
        path = root / "obj" / job.object_name
        if job.label == "binding" or not path.is_file():
            continue
        checked += 1
        own = f"{len(job.label)}{job.label}"  # the namespace as it is spelt in a mangled name
        output = subprocess.run(["nm", "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout
        for line in output.splitlines():
            _, kind, name = line.split(maxsplit=2)
            if kind in "WVu" and f"2fi{own}" not in name:
                raise AssertionError(f"{path.name} defines the weak symbol {name} outside fi::{job.label}")
    assert checked > 0 or _build.prebuilt_libraries("cpu")


def test_wheel_carries_the_library(tmp_path):
    """`pip install --no-build-isolation .` makes a platform wheel with the library in it; it runs without a compiler."""
    source = tmp_path / "src"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(".git", ".venv*", "build", "*.egg-info", "demo_model", "__pycache__"),
    )
    site = tmp_path / "site"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "--target",
        str(site),
        str(source),
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert list((site / "fi_ops" / "_lib").glob("libfi_ops_cpu-*.so"))
    modules = {path.relative_to(source) for path in (source / "fi_ops").rglob("*.py")}
    assert not {str(module) for module in modules if not (site / module).is_file()}, "modules that are not installed"
    call = "torch.ops.fi.rmsnorm(torch.ones(2, 8), torch.ones(8)).sum().item()"
    script = f"import torch, fi_ops; print(fi_ops.__file__); print({call})"
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site), "PATH": "", "FI_OPS_CACHE_DIR": str(tmp_path / "empty")},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert str(site) in run.stdout and "15.99" in run.stdout
