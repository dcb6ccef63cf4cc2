"""The CUDA library: which architectures, which files, how nvcc compiles them. (`_build_report.py`: what ptxas says of each kernel.)

Built by `_build.py`'s machinery. The bindings (`csrc/binding/`, the same sources as the CPU library's) and `csrc/cuda/*.cpp` are
plain C++; `csrc/cuda/kernels/*.cu` are compiled by nvcc for every architecture asked for; a folder inside, such as `sm90/`, only
for the architecture whose row names it. The CUDA runtime is linked in statically and CUDA parts of torch are found at run
time, so a machine with neither a GPU nor a CUDA build of torch can make the library.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from . import _build
from ._build import BuildError, Job, Plan
from ._build_report import kernel_lines, summary

Capability = tuple[int, int]
OLDEST_TOOLKIT = (12, 4)
STILL_WORKS = "CPU ops keep working, and so does stock torch"


@dataclass(frozen=True)
class CudaArch:
    """One row of the arch table. A later row is the better one for the cards that it runs on."""

    name: str
    """As FI_OPS_CUDA_ARCHS has it."""
    gencode: str
    runs_on: Callable[[Capability], bool]
    """Whether a card of that compute capability runs this row's code."""
    folder: str = ""
    """The folder inside kernels/ that is compiled for this row alone."""
    define: str = ""
    """Defined in every file of a library that has this row's folder, for the code that chooses a kernel."""


CUDA_ARCHS = (
    # With PTX: what runs on cards that have no row of their own (the driver compiles it for them when it is loaded).
    CudaArch("sm_80", "arch=compute_80,code=[sm_80,compute_80]", lambda capability: capability >= (8, 0)),
    # `a`: instructions that only this architecture has (wgmma), so no other card runs it, a newer one neither.
    CudaArch(
        "sm_90a", "arch=compute_90a,code=sm_90a", lambda capability: capability == (9, 0), "sm90", "FI_CUDA_SM90A"
    ),
)

_NVCC_FLAGS = (
    "-std=c++20",
    "-O3",
    "-DFI_ON_CUDA",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wno-psabi",
    "-Xptxas=-v",
    "-Xfatbin=-compress-all",
)


# ------------------------------------------------------------------------------------------------ what is at hand


@functools.lru_cache(maxsize=1)
def nvcc() -> tuple[str, str]:
    """(command, version line) of nvcc: $CUDACXX, else the one in $CUDA_HOME/bin, on PATH, or in /usr/local/cuda/bin."""
    home = os.environ.get("CUDA_HOME")
    for name in (os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"):
        path = shutil.which(name) if name else None
        if path is None:
            continue
        text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release (\d+)\.(\d+)", text)
        if release is None:
            raise BuildError(
                f"fi_ops: {path} --version does not answer as nvcc does; set CUDACXX to nvcc. {STILL_WORKS}"
            )
        if (int(release[1]), int(release[2])) < OLDEST_TOOLKIT:
            oldest = ".".join(map(str, OLDEST_TOOLKIT))
            raise BuildError(
                f"fi_ops: the CUDA kernels need CUDA toolkit {oldest} or newer and {path} is of {release[1]}.{release[2]}; "
                f"set CUDACXX to a newer nvcc. {STILL_WORKS}"
            )
        return path, next(line for line in text.splitlines() if "release" in line)
    raise BuildError(
        "fi_ops: the CUDA kernels need nvcc to be compiled and none was found (looked for $CUDACXX, $CUDA_HOME/bin/nvcc, nvcc on "
        "PATH, /usr/local/cuda/bin/nvcc); install the CUDA toolkit, or a wheel built with FI_OPS_BUILD_CUDA=1. "
        + STILL_WORKS
    )


@functools.lru_cache(maxsize=1)
def _toolkit_options() -> tuple[str, str]:
    """The toolkit's -isystem and -L options for g++, from nvcc itself: layouts differ (distribution, conda, pip)."""
    run = subprocess.run([nvcc()[0], "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True)
    folders = {}
    for variable, option in (("INCLUDES", "-I"), ("LIBRARIES", "-L")):
        line = re.search(rf"^#\$ {variable}=(.*)$", run.stderr, re.M)
        folders[variable] = re.findall(rf'"{option}([^"]+)"', line[1]) if line else []
    if not folders["INCLUDES"] or not folders["LIBRARIES"]:
        raise BuildError(f"fi_ops: {nvcc()[0]} --dryrun does not name its folders:\n{run.stderr[:2000]}")
    return (
        " ".join(f"-isystem {folder}" for folder in folders["INCLUDES"]),
        " ".join(f"-L{folder}" for folder in folders["LIBRARIES"]),
    )


def selected_archs() -> tuple[CudaArch, ...]:
    """The rows that FI_OPS_CUDA_ARCHS names (`sm_80,sm_90a`), all of them where it is not set."""
    names = [name for name in re.split(r"[,; ]+", os.environ.get("FI_OPS_CUDA_ARCHS", "")) if name]
    known = [arch.name for arch in CUDA_ARCHS]
    if unknown := [name for name in names if name not in known]:
        raise BuildError(f"fi_ops: FI_OPS_CUDA_ARCHS has {', '.join(unknown)}; it takes {', '.join(known)}")
    return tuple(arch for arch in CUDA_ARCHS if not names or arch.name in names)


def archs_for(capabilities: Iterable[Capability]) -> tuple[CudaArch, ...]:
    """The best row for each of these cards, which are all that a library for this machine needs."""
    best = [[arch for arch in CUDA_ARCHS if arch.runs_on(capability)][-1:] for capability in capabilities]
    return tuple(arch for arch in CUDA_ARCHS if [arch] in best)


# ------------------------------------------------------------------------------------------------ what to build


def cuda_plan(archs: tuple[CudaArch, ...] | None = None) -> Plan:
    """Every object of the CUDA library for `archs` (default: `selected_archs()`). The folders are the source list."""
    archs = selected_archs() if archs is None else archs
    defines = tuple(f"-D{arch.define}" for arch in archs if arch.define)
    command, version = nvcc()
    includes, libraries = _toolkit_options()
    jobs = []

    kernels = _build.CSRC / "cuda" / "kernels"
    compilations: list[tuple[Path, tuple[CudaArch, ...]]] = [  # first, because these take longest
        (source, (arch,)) for arch in archs if arch.folder for source in sorted((kernels / arch.folder).glob("*.cu"))
    ]
    compilations += [(source, archs) for source in sorted(kernels.glob("*.cu"))]
    for source, rows in compilations:
        flags = (*_NVCC_FLAGS, *defines, *(f"'-gencode={arch.gencode}'" for arch in rows))
        key = _build.job_key(source, flags, version)
        jobs.append(Job(source, "+".join(arch.name for arch in rows), flags, key, rule="nvcc"))

    host_flags = (
        *_build.COMMON_FLAGS, "-DFI_ON_CUDA", *defines, f"-DTORCH_TARGET_VERSION={_build.TORCH_TARGET_VERSION}",
        *_build.variant_flags(),
    )  # fmt: skip
    for source in sorted([*(_build.CSRC / "binding").glob("*.cpp"), *(_build.CSRC / "cuda").glob("*.cpp")]):
        jobs.append(Job(source, "cuda", host_flags, _build.job_key(source, host_flags, version)))

    own = f"-I{_build.CSRC / 'include'} -I{_build.CSRC}"
    return Plan(
        "cuda",
        tuple(jobs),
        rules={
            "cxx": f"{_build.compiler()[0]} {_build.includes()} {includes} $flags -c $source {_build.WHOLE_OBJECT}",
            # ptxas's report stays beside the object; `_build_report.py` reads it.
            "nvcc": f"({command} -ccbin {_build.compiler()[0]} {own} $flags -c $source {_build.WHOLE_OBJECT}) >$out.log 2>&1 "
            "|| (cat $out.log; exit 1)",
        },
        # The runtime's symbols stay inside: torch's own libcudart, maybe of another version, must not take their place.
        link=_build.link_command(
            f"{libraries} -lcudart_static -ldl -lrt -lpthread -s -Wl,--exclude-libs,ALL -Wl,--no-undefined"
        ),
    )


def build_cuda(
    verbose: bool = False,
    progress: Callable[[str], None] | None = None,
    archs: tuple[CudaArch, ...] | None = None,
    every_kernel: bool = False,
) -> Path:
    """Build the CUDA library for `archs` (default: `selected_archs()`), or find it in the cache; see `_build.build`.

    What was compiled is summed up at the end: the slowest files, and every kernel that spills registers. `every_kernel`: a line
    for each kernel that was compiled stands before that.
    """
    plan = cuda_plan(archs)
    absent = [job for job in plan.jobs if job.rule == "nvcc" and not plan.object_path(job).is_file()]
    library = _build.build(plan, verbose, progress)
    compiled = [job for job in absent if plan.object_path(job).is_file()]
    for line in [*(kernel_lines(plan, compiled) if every_kernel else []), *summary(plan, compiled)]:
        (progress or _build.report)(line)
    return library


def prebuilt_variant(archs: tuple[CudaArch, ...]) -> str:
    """What a prebuilt library's name says of its architectures: `.sm_80.sm_90a`."""
    return "".join(f".{arch.name}" for arch in archs)


def prebuilt_library(capabilities: Iterable[Capability]) -> Path | None:
    """A library compiled ahead of time from these very sources that runs on all these cards, or None."""
    cards = tuple(capabilities)
    for path in _build.prebuilt_libraries("cuda"):
        archs = [arch for arch in CUDA_ARCHS if arch.name in path.name.split(".")]
        if all(any(arch.runs_on(card) for arch in archs) for card in cards):
            return path
    return None
