"""Which kernels ran, and which of the library did not: `python -m tests.emulation.launches FILE [PATTERN]`.

FILE is what processes under FI_EMULATION_LAUNCHES=FILE have left; PATTERN, a regular expression, picks kernels by their names.
"""

from __future__ import annotations

import collections
import re
import subprocess
import sys
from pathlib import Path

KERNEL = re.compile(r"^([0-9a-f]+) [tTwW] (?:void )?(fi::cuda::.*_kernel\b.*)$", re.M)


def launches(file: Path) -> dict[str, int]:
    """How often each kernel of the libraries ran that FILE names."""
    counts = collections.Counter(file.read_text().splitlines())
    kernels = {}
    for library in {line.rsplit(" ", 1)[0] for line in counts}:
        table = subprocess.run(["nm", "-C", library], capture_output=True, text=True, check=True).stdout
        for address, name in KERNEL.findall(table):
            kernels[name] = kernels.get(name, 0) + counts[f"{library} {int(address, 16)}"]
    return kernels


if __name__ == "__main__":
    pattern = re.compile(sys.argv[2] if len(sys.argv) > 2 else "")
    found = {name: count for name, count in launches(Path(sys.argv[1])).items() if pattern.search(name)}
    for name, count in sorted(found.items()):
        print(f"{count:7} {name}")
    print(f"{sum(count > 0 for count in found.values())} of {len(found)} kernels ran")
