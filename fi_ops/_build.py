"""The one builder: compiles a device's native library with ninja, ahead of time or on first use.

It serves `pip install .` (through `_build_backend.py`), `python -m fi_ops.build` and the first call of an op (`_load.py`),
and imports neither torch nor the rest of the package, so that a build environment can use it too. Here is what every
device shares, and the CPU library; the CUDA library is in `_build_cuda.py`.

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

COMMON_FLAGS = [
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


# The end of a compiler's command: an object has its name only once it is whole, whatever stops the compiler. The shell's `times`
# says what the compiler took of the processor, which other load on the machine hardly changes.
WHOLE_OBJECT = "-o $out.part && times >$out.times && mv $out.part $out"


class BuildError(RuntimeError):
    """The native library can't be built here; the message says what is missing and what to do."""


@dataclass(frozen=True)
class Job:
    """One object file: its source, flags, and the hash of all that decides its content."""

    source: Path
    label: str
    flags: tuple[str, ...]
    key: str
    rule: str = "cxx"
    """Which of the plan's rules compiles it."""

    @property
    def object_name(self) -> str:
        return f"{self.source.stem}.{self.label}.{self.key}.o"


@dataclass(frozen=True)
class Plan:
    """All that a device's library is made of, and how: ninja rules by name, and the command that links it."""

    device: str
    jobs: tuple[Job, ...]
    rules: dict[str, str]
    link: str
    """With `@$out.rsp` for the objects and `$out` for the library."""

    @property
    def library_name(self) -> str:
        digest = hashlib.sha256("\n".join(job.object_name for job in self.jobs).encode()).hexdigest()[:20]
        return f"libfi_ops_{self.device}-{digest}.so"

    def object_path(self, job: Job) -> Path:
        return cache_root() / "obj" / job.object_name


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
        "fi_ops: the kernels need a C++20 compiler and none was found (looked for $CXX, g++, clang++, c++); install "
        "one (Debian: `apt install g++`), or install a wheel that has the library prebuilt"
    )


def ninja_command() -> list[str]:
    """How to run ninja: the `ninja` package of this interpreter, else the one on PATH."""
    if importlib.util.find_spec("ninja") is not None:
        return [sys.executable, "-m", "ninja"]
    path = shutil.which("ninja")
    if path:
        return [path]
    raise BuildError("fi_ops: building the kernels needs ninja and it was not found; run `pip install ninja`")


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


def job_key(source: Path, flags: tuple[str, ...], *tools: str) -> str:
    """The key of a source compiled with `flags` by the C++ compiler and `tools` (what those say of their versions)."""
    h = hashlib.sha256()
    for part in (compiler()[1], platform.machine(), *tools, *flags):
        h.update(part.encode() + b"\0")
    for path in _closure(source):
        h.update(path.relative_to(CSRC).as_posix().encode() + b"\0" + path.read_bytes())
    return h.hexdigest()[:20]


def variant_flags() -> tuple[str, ...]:
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
    common = (*COMMON_FLAGS, f"-DFI_ISA_MASK={mask}", *variant_flags())
    jobs = []
    for source in sorted([*(CSRC / "binding").glob("*.cpp"), *(CSRC / "cpu").glob("*.cpp")]):
        flags = (*common, f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}")
        jobs.append(Job(source, "binding", flags, job_key(source, flags)))
    for source in sorted((CSRC / "cpu" / "kernels").glob("*.cpp")):
        for isa in levels:
            flags = (*common, *isa.flags, f"-DFI_ISA={isa.name}", f"-DFI_ISA_LEVEL={isa.level}")
            jobs.append(Job(source, isa.name, flags, job_key(source, flags)))
    return jobs


def includes() -> str:
    """Include flags of every file: ours, and torch's as -isystem, because its headers are not ours to warn about."""
    return f"-I{CSRC / 'include'} -I{CSRC} -isystem {torch_root() / 'include'}"


def link_command(extra: str = "") -> str:
    """Link against torch. Its libraries are loaded before ours, so the loader finds them by soname: no path is recorded."""
    sanitizer = " ".join(flag for flag in variant_flags() if flag.startswith("-fsanitize"))
    options = f"-L{torch_root() / 'lib'} -ltorch_cpu -lc10 {extra}"
    return f"{compiler()[0]} -shared {sanitizer} @$out.rsp -o $out {options}"


def cpu_plan() -> Plan:
    compile_command = f"{compiler()[0]} {includes()} $flags -c $source {WHOLE_OBJECT}"
    return Plan("cpu", tuple(cpu_jobs()), {"cxx": compile_command}, link_command())


def source_hash() -> str:
    """A hash of all native sources and of the builder: names a prebuilt library."""
    h = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("_build*.py")):
        h.update(path.read_bytes())
    for path in sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")):
        h.update(path.relative_to(CSRC).as_posix().encode() + b"\0" + path.read_bytes())
    return h.hexdigest()[:20]


def prebuilt_name(device: str, variant: str = "") -> str:
    """The file name of a library built ahead of time. `variant` says what else one must know to choose it."""
    return f"libfi_ops_{device}-{source_hash()}{variant}.so"


def prebuilt_libraries(device: str) -> list[Path]:
    """The libraries built ahead of time (`pip install .`, `--out fi_ops/_lib`) from these very sources."""
    return [] if os.environ.get("FI_OPS_SANITIZE") else sorted(PREBUILT.glob(prebuilt_name(device, "*")))


# ------------------------------------------------------------------------------------------------ building


def build_cpu(verbose: bool = False, progress: Callable[[str], None] | None = None) -> Path:
    """Build the CPU library, or find it in the cache; see `build`."""
    return build(cpu_plan(), verbose, progress)


def build(plan: Plan, verbose: bool = False, progress: Callable[[str], None] | None = None) -> Path:
    """Build the plan's library, or find it in the cache.

    Args:
        verbose: print the compiler commands and their output.
        progress: gets a short line now and then; default writes to stderr (one line, rewritten on a terminal).

    Returns:
        the path of the shared library.

    Raises:
        BuildError: what is missing, or the first compiler error.
    """
    root = cache_root()
    library = root / "lib" / plan.library_name
    if library.is_file():
        return library
    with _lock(root / "build.lock"):
        if not library.is_file():  # else another process built it while we waited
            _run_ninja(root, plan, library, verbose, progress or report)
            _prune(root, plan)
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


def _run_ninja(root: Path, plan: Plan, library: Path, verbose: bool, progress: Callable[[str], None]) -> None:
    for folder in ("obj", "lib"):
        (root / folder).mkdir(mode=0o700, exist_ok=True)
    staging = root / "lib" / f".{library.name}.{os.getpid()}"
    lines = ["ninja_required_version = 1.8", f"builddir = {_quote(str(root / 'obj'))}"]
    for name, rule in plan.rules.items():
        lines += [f"rule {name}", f"  command = {rule}", "  description = $what"]
    lines += [
        "rule link",
        f"  command = {plan.link}",
        "  rspfile = $out.rsp",
        "  rspfile_content = $in_newline",
        "  description = link",
    ]
    objects = []
    for job in plan.jobs:
        out = _quote(str(plan.object_path(job)))
        objects.append(out)
        if plan.object_path(
            job
        ).is_file():  # its name says all: ninja's log, which knows one checkout's paths, isn't asked
            continue
        lines += [
            f"build {out}: {job.rule}",
            f"  flags = {' '.join(job.flags)}",
            f"  source = {_quote(str(job.source))}",
            f"  what = {job.source.stem} {job.label}",
        ]
    lines.append(f"build {_quote(str(staging))}: link {' '.join(objects)}")
    script = root / "obj" / "build.ninja"
    script.write_text("\n".join(lines) + "\n")
    what = f"the {plan.device.upper()} kernels"

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
            progress(f"fi_ops: building {what} {match[1]} ({match[2]})")
    if process.wait() != 0:
        staging.unlink(missing_ok=True)
        text = "".join(log)
        start = text.find("FAILED:")
        raise BuildError(f"fi_ops: the compiler failed ({compiler()[0]}); its output:\n{text[max(start, 0) :][:6000]}")
    staging.with_suffix(staging.suffix + ".rsp").unlink(missing_ok=True)
    os.replace(staging, library)  # atomic: a reader sees all of it or nothing
    progress(f"fi_ops: built {what} in {time.monotonic() - started:.0f} s")


def report(line: str) -> None:
    """Progress rewrites one line of a terminal, and a log gets a tenth of it; everything else is there to stay."""
    terminal, is_progress = sys.stderr.isatty(), line.startswith("fi_ops: building ")
    if terminal:
        print(f"\r\033[K{line}", end="" if is_progress else "\n", file=sys.stderr, flush=True)
    elif not is_progress or re.search(r" (1|\d+0)/", line):
        print(line, file=sys.stderr, flush=True)


def cpu_seconds(built: Path) -> float | None:
    """What the compiler took of one core for an object, user and system together; None where that was not kept."""
    times = built.with_suffix(".o.times")
    if not times.is_file():
        return None
    children = times.read_text().splitlines()[1]  # `0m12.340000s 0m0.560000s`, of what the shell started
    return sum(60 * int(minutes) + float(seconds) for minutes, seconds in re.findall(r"(\d+)m([\d.]+)s", children))


def _prune(root: Path, plan: Plan, keep_days: float = 14) -> None:
    """Drop objects and libraries that no build has used for two weeks."""
    horizon = time.time() - keep_days * 86400
    current = {job.object_name for job in plan.jobs}
    for path in [*(root / "obj").glob("*.o*"), *(root / "lib").glob("*.so")]:
        if path.name.removesuffix(".log").removesuffix(".times") in current:
            os.utime(path)
        elif path.stat().st_mtime < horizon:
            path.unlink(missing_ok=True)
