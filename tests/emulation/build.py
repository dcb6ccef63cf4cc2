"""Builds the emulated library: the CUDA bindings and kernels, compiled by g++ against the shims in `include/`.

`python -m tests.emulation.build` prints its path; under FI_EMULATION_CAPABILITY=90 with Hopper's kernels. Objects are cached by
content, next to the package's own.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fi_ops import _build, _build_cuda

HERE = Path(__file__).resolve().parent
FLAGS = (
    "-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-DFI_ON_CUDA", "-Wall",
    "-Wno-unknown-pragmas", "-Wno-unused-variable", "-Wno-unused-but-set-variable", "-Wno-psabi", "-x", "c++",
)  # fmt: skip


def supported() -> bool:
    """The emulator's fibers are written for x86-64."""
    return platform.machine() == "x86_64"


def capability() -> int:
    """What the emulated GPU claims, from FI_EMULATION_CAPABILITY: 80 or 90."""
    text = os.environ.get("FI_EMULATION_CAPABILITY") or "80"
    if text not in ("80", "90"):
        raise ValueError(f"FI_EMULATION_CAPABILITY is 80 or 90, got {text}")
    return int(text)


def runtime_sources() -> list[Path]:
    """The emulator itself, what every program of emulated kernels is linked with."""
    return sorted(path for path in HERE.glob("*.cpp") if path.name != "gpu.cpp")


def _archs() -> list[_build_cuda.CudaArch]:
    """The rows of the arch table that the library is for."""
    card = divmod(capability(), 10)
    return [arch for arch in _build_cuda.CUDA_ARCHS if arch.runs_on(card)]


def _sources() -> list[Path]:
    """As the CUDA library has them: a folder inside kernels/ where a row of the arch table names it."""
    kernels = _build.CSRC / "cuda" / "kernels"
    folders = [kernels, *(kernels / arch.folder for arch in _archs() if arch.folder)]
    own = [source for folder in reversed(folders) for source in sorted(folder.glob("*.cu"))]
    return [*own, *sorted((_build.CSRC / "binding").glob("*.cpp")), *sorted(HERE.glob("*.cpp"))]


def _closure(source: Path, folders: tuple[Path, ...]) -> list[Path]:
    """The source and the headers of ours that it includes."""
    found = [source]
    for path in found:
        for name in re.findall(r'^\s*#\s*include\s*["<]([^">]+)[">]', path.read_text(), re.M):
            header = next((f for folder in folders if (f := folder / name).is_file()), None)
            if header and header not in found:
                found.append(header)
    return found


def build() -> Path:
    """Compile what changed, link, return the library's path. Raises RuntimeError with the compiler's output."""
    folders = (HERE / "include", _build.CSRC / "include", _build.CSRC)
    root = _build.cache_root() / "emulated"
    root.mkdir(exist_ok=True)
    torch = _build.torch_root()
    common = [
        _build.compiler()[0], *FLAGS, f"-DTORCH_TARGET_VERSION={_build.TORCH_TARGET_VERSION}",
        *(f"-I{folder}" for folder in folders), "-isystem", str(torch / "include"),
    ]  # fmt: skip
    defines = [arch.define for arch in _archs() if arch.define]

    def compiled(source: Path) -> Path:
        texts = [(path.name, path.read_text()) for path in _closure(source, folders)]
        # Defined only where it is asked for: most objects are the same for every capability.
        own = [f"-D{define}" for define in defines if any(define in text for _, text in texts)]
        key = hashlib.sha256(repr((FLAGS, own, _build.compiler()[1], texts)).encode()).hexdigest()[:20]
        target = root / f"{source.stem}.{key}.o"
        if not target.is_file():
            staging = target.with_suffix(f".{os.getpid()}.tmp")
            _run([*common, *own, "-c", str(source), "-o", str(staging)])
            os.replace(staging, target)
        return target

    with _build._lock(root / "build.lock"), ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or 2)) as pool:
        objects = [str(path) for path in pool.map(compiled, _sources())]
    digest = hashlib.sha256("\n".join(objects).encode()).hexdigest()[:20]
    library = root / f"libfi_ops_emulated-{digest}.so"
    if not library.is_file():
        staging = library.with_suffix(f".{os.getpid()}.tmp")
        _run([
            _build.compiler()[0], "-shared", *objects, "-o", str(staging), f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10",
            "-Wl,--no-undefined",
        ])  # fmt: skip
        os.replace(staging, library)
    return library


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"emulation: {' '.join(command)}\n{result.stderr[:8000]}")


if __name__ == "__main__":
    print(build())
