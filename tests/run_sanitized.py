"""The op sweep, random batches and hostile page tables on an AddressSanitizer + UBSan build of the CPU library.

`make asan`; not collected by pytest. The sanitizer's runtime must be loaded before Python, so this starts pytest in a child
with LD_PRELOAD.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from fi_ops import _build


def main() -> int:
    os.environ.setdefault("FI_OPS_SANITIZE", "address,undefined")
    cxx, _ = _build.compiler()
    runtimes = [
        subprocess.run([cxx, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    env = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        # CPython and torch leak by design; we look for bad accesses, not leaks.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:detect_odr_violation=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    folder = Path(__file__).resolve().parent
    files = [
        str(folder / name)
        for name in ("test_every_op.py", "test_batch_attention.py", "test_mla.py", "test_fp8_attention.py")
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    chosen = (
        "numerics or bad_input or thread_invariant or lower_isa or random_batches or hostile or rope_and_append"
        " or nan_behind_the_end"
    )
    return subprocess.run([*command, "-k", chosen, *sys.argv[1:]], env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
