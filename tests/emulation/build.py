"""Builds the emulated library: the CUDA bindings and kernels, compiled by g++ against the shims in `include/`.

`python -m tests.emulation.build` prints its path. Objects are cached by content, next to the package's own.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fi_ops import _build

HERE = Path(__file__).resolve().parent
FLAGS = (
    "-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-DFI_ON_CUDA", "-Wall",
    "-Wno-unknown-pragmas", "-Wno-unused-variable", "-Wno-unused-but-set-variable", "-Wno-psabi", "-x", "c++",
)  # fmt: skip


def supported() -> bool:
    """The emulator's fibers are written for x86-64."""
    return platform.machine() == "x86_64"


def _sources() -> list[Path]:
    """All but kernels/sm90: those instructions have no twin."""
    csrc = _build.CSRC
    return sorted([*(csrc / "binding").glob("*.cpp"), *(csrc / "cuda" / "kernels").glob("*.cu"), *HERE.glob("*.cpp")])


def _key(source: Path, folders: tuple[Path, ...]) -> str:
    """A hash of the source, the headers of ours that it includes, and how it is compiled."""
    h = hashlib.sha256(repr((FLAGS, _build.compiler()[1])).encode())
    seen, queue = {source}, [source]
    while queue:
        path = queue.pop()
        h.update(path.name.encode() + path.read_bytes())
        for name in re.findall(r'^\s*#\s*include\s*["<]([^">]+)[">]', path.read_text(), re.M):
            found = next((f for folder in folders if (f := folder / name).is_file()), None)
            if found and found not in seen:
                seen.add(found)
                queue.append(found)
    return h.hexdigest()[:20]


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

    def compiled(source: Path) -> Path:
        target = root / f"{source.stem}.{_key(source, folders)}.o"
        if not target.is_file():
            staging = target.with_suffix(f".{os.getpid()}.tmp")
            _run([*common, "-c", str(source), "-o", str(staging)])
            os.replace(staging, target)
        return target

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or 2)) as pool:
        objects = [str(path) for path in pool.map(compiled, _sources())]
    digest = hashlib.sha256("\n".join(objects).encode()).hexdigest()[:20]
    library = root / f"libfi_ops_emulated-{digest}.so"
    if not library.is_file():
        staging = library.with_suffix(f".{os.getpid()}.tmp")
        left_out = root / f"left_out-{digest}.s"
        left_out.write_text(_left_out(objects))
        _run([
            _build.compiler()[0], "-shared", *objects, str(left_out), "-o", str(staging), f"-L{torch / 'lib'}",
            "-ltorch_cpu", "-lc10",
        ])  # fmt: skip
        os.replace(staging, library)
    return library


def _left_out(objects: list[str]) -> str:
    """Assembly for entry points that no object defines (kernels for sm_90 alone): a call ends the process."""
    table = subprocess.run(["nm", *objects], capture_output=True, text=True, check=True).stdout
    entries = re.findall(r" ([A-Za-z]) (_ZN2fi4cuda\w+)", table)
    missing = {name for kind, name in entries if kind == "U"} - {name for kind, name in entries if kind != "U"}
    if missing:
        print("emulation: not in this build:", *sorted(missing), flush=True)
    lines = [f".hidden {name}\n.globl {name}\n{name}:\n  ud2" for name in sorted(missing)]
    return '.section .note.GNU-stack,"",@progbits\n.text\n' + "\n".join(lines) + "\n"


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"emulation: {' '.join(command)}\n{result.stderr[:8000]}")


if __name__ == "__main__":
    print(build())
