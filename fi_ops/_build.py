"""The one builder: compiles a device's native library with ninja, ahead of time or on first use.

It serves `pip install .` (through `_build_backend.py`), `python -m fi_ops.build` and the first call of an op (`_load.py`),
and imports neither torch nor the rest of the package, so that a build environment can use it too.

How a build is keyed. An object file is named by a hash of everything that decides its content: the source, the headers it
includes from `csrc/`, the flags and the compiler. A library is named by the hashes of its objects. So editing one kernel
recompiles one file (per ISA level), a second process finds the first one's library, two checkouts share what they have
in common, and file times never matter. The cache is `$FI_OPS_CACHE_DIR`, else `$XDG_CACHE_HOME/fi_ops`, else
`~/.cache/fi_ops`; it belongs to one user (mode 0700, refused otherwise) and is locked while a build runs.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parent / "csrc"
PREBUILT = Path(__file__).resolve().parent / "_lib"  # where `pip install .` puts libraries
# The oldest torch whose stable ABI we call (2.11); a library built so runs under every later torch.
TORCH_TARGET_VERSION = "0x020b000000000000"

_X86_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
_X86_AVX2 = ["-mavx2", "-mfma", "-mf16c"]


@dataclass(frozen=True)
class IsaLevel:
    """One row of the ISA table: kernels are compiled once per level and chosen at run time (`fi/cpu/isa.h`)."""

    name: str
    level: int
    flags: tuple[str, ...]


ISA_LEVELS = (
    IsaLevel("baseline", 0, ()),
    IsaLevel("avx2", 1, tuple(_X86_AVX2)),
    IsaLevel("avx512", 2, tuple(_X86_AVX2 + _X86_AVX512)),
    IsaLevel("avx512_bf16", 3, (*_X86_AVX2, *_X86_AVX512, "-mavx512bf16")),
    IsaLevel("amx", 4, (*_X86_AVX2, *_X86_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16")),
)

_COMMON_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-psabi",
]


class BuildError(RuntimeError):
    """The native library can't be built here; the message says what is missing and what to do."""


@dataclass(frozen=True)
class Job:
    """One object file: its source, flags, and the hash of all that decides its content."""

    source: Path
    label: str
    flags: tuple[str, ...]
    key: str

    @property
    def object_name(self) -> str:
        return f"{self.source.stem}.{self.label}.{self.key}.o"


# ------------------------------------------------------------------------------------------------ what is at hand


def cache_root() -> Path:
    """The cache folder, created owner-only. Raises BuildError when it belongs to someone else or is open to others."""
    env = os.environ.get("FI_OPS_CACHE_DIR")
    root = Path(env) if env else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fi_ops"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = root.stat()
    except OSError as e:
        raise BuildError(f"fi_ops: can't create the cache folder {root}: {e}; set FI_OPS_CACHE_DIR to one") from e
    if info.st_uid != os.getuid() or info.st_mode & 0o022:
        raise BuildError(
            f"fi_ops: the cache folder {root} must belong to you and be writable by you alone (native code is loaded "
            f"from it); run `chmod 700 {root}` or set FI_OPS_CACHE_DIR to another folder"
        )
    return root


@functools.lru_cache(maxsize=1)
def compiler() -> tuple[str, str]:
    """(command, version line) of the C++ compiler: $CXX, else g++, clang++, c++."""
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        path = shutil.which(name.split()[0])
        if path:
            out = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
            return path, out.splitlines()[0] if out else path
    raise BuildError(
        "fi_ops: the CPU kernels need a C++20 compiler and none was found (looked for $CXX, g++, clang++, c++); install "
        "one (Debian: `apt install g++`), or install a wheel that has the library prebuilt"
    )


def ninja_command() -> list[str]:
    """How to run ninja: the `ninja` package of this interpreter, else the one on PATH."""
    if importlib.util.find_spec("ninja") is not None:
        return [sys.executable, "-m", "ninja"]
    path = shutil.which("ninja")
    if path:
        return [path]
    raise BuildError("fi_ops: building the CPU kernels needs ninja and it was not found; run `pip install ninja`")


def torch_root() -> Path:
    """The installed torch's folder (its headers and libraries), found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(
            "fi_ops: torch is not installed, and its headers are needed; `pip install torch` (2.11 or newer)"
        )
    return Path(next(iter(spec.submodule_search_locations)))


@functools.lru_cache(maxsize=1)
def isa_levels() -> tuple[IsaLevel, ...]:
    """The levels this compiler can compile for this architecture: all five on x86-64, the baseline elsewhere."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ISA_LEVELS[:1]
    cxx, _ = compiler()
    probe = [cxx, "-x", "c++", "-fsyntax-only", "-"]
    usable = []
    for isa in ISA_LEVELS:
        run = subprocess.run([*probe, *isa.flags], input="#include <cstdint>", capture_output=True, text=True)
        if run.returncode == 0:
            usable.append(isa)
    return tuple(usable)


# ------------------------------------------------------------------------------------------------ what to build


@functools.cache
def _closure(source: Path) -> tuple[Path, ...]:
    """The file and every header of ours that it includes, directly or not (system and torch headers are not ours)."""
    seen: dict[Path, None] = {source: None}
    queue = [source]
    while queue:
        current = queue.pop()
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', current.read_text(), re.M):
            for base in (current.parent, CSRC / "include", CSRC):
                path = (base / name).resolve()
                if path.is_file():
                    if path not in seen:
                        seen[path] = None
                        queue.append(path)
                    break
    return tuple(sorted(seen))


def _key(source: Path, flags: tuple[str, ...]) -> str:
    h = hashlib.sha256()
    for part in (compiler()[1], platform.machine(), *flags):
        h.update(part.encode() + b"\0")
    for path in _closure(source):
        h.update(path.relative_to(CSRC).as_posix().encode() + b"\0" + path.read_bytes())
    return h.hexdigest()[:20]


def _variant_flags() -> tuple[str, ...]:
    """Flags of a non-standard build: FI_OPS_SANITIZE=address,undefined."""
    sanitize = os.environ.get("FI_OPS_SANITIZE")
    return (
        (f"-fsanitize={sanitize}", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1")
        if sanitize
        else ()
    )


def cpu_jobs() -> list[Job]:
    """Every object of the CPU library: bindings once, kernels once per ISA level. The folders are the source list."""
    levels = isa_levels()
    mask = sum(1 << isa.level for isa in levels)
    common = (*_COMMON_FLAGS, f"-DFI_ISA_MASK={mask}", *_variant_flags())
    jobs = []
    for source in sorted([*(CSRC / "binding").glob("*.cpp"), *(CSRC / "cpu").glob("*.cpp")]):
        flags = (*common, f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}")
        jobs.append(Job(source, "binding", flags, _key(source, flags)))
    for source in sorted((CSRC / "cpu" / "kernels").glob("*.cpp")):
        for isa in levels:
            flags = (*common, *isa.flags, f"-DFI_ISA={isa.name}", f"-DFI_ISA_LEVEL={isa.level}")
            jobs.append(Job(source, isa.name, flags, _key(source, flags)))
    return jobs


def _library_name(jobs: list[Job]) -> str:
    digest = hashlib.sha256("\n".join(job.object_name for job in jobs).encode()).hexdigest()[:20]
    return f"libfi_ops_cpu-{digest}.so"


def source_hash() -> str:
    """A hash of all native sources and of this file: names a prebuilt library."""
    h = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")):
        h.update(path.relative_to(CSRC).as_posix().encode() + b"\0" + path.read_bytes())
    return h.hexdigest()[:20]


def prebuilt_library(device: str) -> Path | None:
    """The library that `pip install .` compiled, if it is there and was made from these very sources."""
    path = PREBUILT / f"libfi_ops_{device}-{source_hash()}.so"
    return path if path.is_file() and not os.environ.get("FI_OPS_SANITIZE") else None


# ------------------------------------------------------------------------------------------------ building


def build_cpu(verbose: bool = False, progress: Callable[[str], None] | None = None) -> Path:
    """Build the CPU library, or find it in the cache.

    Args:
        verbose: print the compiler commands and their output.
        progress: gets a short line now and then; default writes to stderr (one line, rewritten on a terminal).

    Returns:
        the path of the shared library.

    Raises:
        BuildError: what is missing, or the first compiler error.
    """
    jobs = cpu_jobs()
    root = cache_root()
    library = root / "lib" / _library_name(jobs)
    if library.is_file():
        return library
    with _lock(root / "build.lock"):
        if not library.is_file():  # else another process built it while we waited
            _run_ninja(root, jobs, library, verbose, progress or _report)
            _prune(root, jobs)
    return library


class _lock:
    """An exclusive lock between processes; waits, and says so when the wait is long."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        self.file = open(self.path, "w")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("fi_ops: another process is building the kernels; waiting for it ...", file=sys.stderr, flush=True)
            fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *exc) -> None:
        self.file.close()  # closing drops the lock


def _quote(text: str) -> str:
    return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _run_ninja(root: Path, jobs: list[Job], library: Path, verbose: bool, progress: Callable[[str], None]) -> None:
    for folder in ("obj", "lib"):
        (root / folder).mkdir(mode=0o700, exist_ok=True)
    cxx, _ = compiler()
    torch = torch_root()
    # -isystem, not -I: torch's headers are not ours to warn about. libtorch_cpu is already loaded when ours is, so the
    # loader resolves it by its soname and no path is recorded.
    includes = f"-I{CSRC / 'include'} -I{CSRC} -isystem {torch / 'include'}"
    staging = root / "lib" / f".{library.name}.{os.getpid()}"
    lines = [
        "ninja_required_version = 1.8",
        f"builddir = {_quote(str(root / 'obj'))}",
        "rule cc",
        f"  command = {cxx} {includes} $flags -c $source -o $out",
        "  description = $what",
        "rule link",
        f"  command = {cxx} -shared $flags @$out.rsp -o $out -L{torch / 'lib'} -ltorch_cpu -lc10",
        "  rspfile = $out.rsp",
        "  rspfile_content = $in_newline",
        "  description = link",
    ]
    objects = []
    for job in jobs:
        out = _quote(str(root / "obj" / job.object_name))
        objects.append(out)
        lines += [
            f"build {out}: cc",
            f"  flags = {' '.join(job.flags)}",
            f"  source = {_quote(str(job.source))}",
            f"  what = {job.source.stem} {job.label}",
        ]
    link_flags = " ".join(f for f in _variant_flags() if f.startswith("-fsanitize"))
    lines += [f"build {_quote(str(staging))}: link {' '.join(objects)}", f"  flags = {link_flags}"]
    script = root / "obj" / "build.ninja"
    script.write_text("\n".join(lines) + "\n")

    limit = os.environ.get("MAX_JOBS")
    command = [*ninja_command(), "-f", str(script), *(["-j", limit] if limit else []), *(["-v"] if verbose else [])]
    started = time.monotonic()
    log: list[str] = []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        log.append(line)
        match = re.match(r"\[(\d+/\d+)\] (.*)", line)
        if verbose:
            progress(line.rstrip())
        elif match:
            progress(f"fi_ops: building the CPU kernels {match[1]} ({match[2]})")
    if process.wait() != 0:
        staging.unlink(missing_ok=True)
        text = "".join(log)
        start = text.find("FAILED:")
        raise BuildError(f"fi_ops: the compiler failed ({cxx}); its output:\n{text[max(start, 0) :][:6000]}")
    staging.with_suffix(staging.suffix + ".rsp").unlink(missing_ok=True)
    os.replace(staging, library)  # atomic: a reader sees all of it or nothing
    progress(f"fi_ops: built the CPU kernels in {time.monotonic() - started:.0f} s")
    if sys.stderr.isatty() and not verbose:
        print(file=sys.stderr)


def _report(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
    elif "building" not in line or re.search(r" (1|\d+0)/", line):  # a log gets a tenth of the lines
        print(line, file=sys.stderr, flush=True)


def _prune(root: Path, jobs: list[Job], keep_days: float = 14) -> None:
    """Drop objects and libraries that no build has used for two weeks."""
    horizon = time.time() - keep_days * 86400
    current = {job.object_name for job in jobs}
    for path in [*(root / "obj").glob("*.o"), *(root / "lib").glob("*.so")]:
        if path.name in current:
            os.utime(path)
        elif path.stat().st_mtime < horizon:
            path.unlink(missing_ok=True)
