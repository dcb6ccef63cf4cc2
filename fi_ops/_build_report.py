"""What the compiler made of each CUDA kernel: registers, spills, stack, shared memory, and the time it took.

Read from the logs that `_build_cuda.py` keeps beside the objects. Static shared memory is what the kernel declares. Dynamic is
what `launch_with` (`fi/cuda/launch.h`) gives it, whose instantiations name kernel and bytes in the object file. Kernels launched
otherwise get none, or an amount that follows from sizes and the card, up to 163 KB a block on sm_80 and 227 KB on sm_90a.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from . import _build
from ._build import Job, Plan


@dataclass(frozen=True)
class KernelUse:
    """What one kernel takes on one architecture, as ptxas reports it; bytes of memory are a thread's, of shared a block's."""

    source: Path
    kernel: str
    arch: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    called_spills: int
    """Bytes stored and loaded by the functions that it calls, the registers that they save for it among them."""
    shared: int
    ptxas_seconds: float

    @property
    def spills(self) -> bool:
        return self.spill_stores + self.spill_loads > 0


_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'\n")
# Once for the kernel, and once for each function of it that was not inlined.
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def kernel_uses(source: Path, log: str) -> list[KernelUse]:
    """The report of `nvcc -Xptxas -v` on `source`, one entry a kernel and architecture."""
    _, *entries = _ENTRY.split(log)
    uses = []
    for kernel, arch, text in zip(entries[::3], entries[1::3], entries[2::3], strict=True):
        frames = [tuple(map(int, frame)) for frame in _FRAME.findall(text)]
        registers, shared = re.search(r"Used (\d+) registers", text), re.search(r"(\d+) bytes smem", text)
        took = re.search(r"Compile time = ([\d.]+) ms", text)
        if registers is None or not frames:
            raise ValueError(f"{source.name}: ptxas says nothing of {kernel} for {arch}: {text[:300]}")
        (stack, stores, loads), *called = frames
        uses.append(
            KernelUse(
                source,
                kernel,
                arch,
                int(registers[1]),
                stack,
                stores,
                loads,
                called_spills=sum(saved + restored for _, saved, restored in called),
                shared=int(shared[1]) if shared else 0,
                ptxas_seconds=float(took[1]) / 1000 if took else 0.0,
            )
        )
    return uses


def _log(plan: Plan, job: Job) -> Path:
    return plan.object_path(job).with_suffix(".o.log")


def plan_uses(plan: Plan, jobs: Iterable[Job] | None = None) -> list[KernelUse]:
    """What every kernel of a plan (or of some of its jobs) that has been built takes."""
    uses = []
    for job in plan.jobs if jobs is None else jobs:
        if job.rule == "nvcc" and _log(plan, job).is_file():
            uses += kernel_uses(job.source, _log(plan, job).read_text())
    return uses


def readable(names: list[str]) -> list[str]:
    """Kernels' names with template arguments, without what all have in common; as they are where there is no c++filt."""
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return names
    run = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return [_shortened(name) for name in run.stdout.splitlines()]


# `launch_with<&(void f<float>(P)), 64ul, P&>(...)`; a kernel that is no template stands there as `&f`.
_LAUNCH = re.compile(r"launch_(?:clusters_)?with<&(?:\((.+?\))\)|([^,]+)), (\d+)ul")


def dynamic_shared(demangled: str) -> dict[str, int]:
    """Bytes of dynamic shared memory by readable kernel name, from an object file's demangled symbols."""
    return {_shortened(template or plain): int(size) for template, plain, size in _LAUNCH.findall(demangled)}


def _symbols(path: Path) -> str:
    tool = shutil.which("nm")
    return subprocess.run([tool, "-C", path], capture_output=True, text=True, check=True).stdout if tool else ""


def _shortened(name: str) -> str:
    """`void fi::cuda::(anonymous namespace)::sample<fi::f16, (fi::Fp8)0>(fi::P, int)` is `sample<f16, (Fp8)0>`."""
    name = name.removeprefix("void ").replace(" >", ">")
    for common in ("(anonymous namespace)::", "fi::cuda::", "fi::"):
        name = name.replace(common, "")
    depth = 0
    for i, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:  # of the parameters: those of casts are inside <>
            return name[:i]
    return name


def kernel_lines(plan: Plan, jobs: Iterable[Job]) -> list[str]:
    """A line for each kernel of these jobs and architecture, under a heading; source by source."""
    jobs = list(jobs)
    uses = sorted(plan_uses(plan, jobs), key=lambda use: (use.source.name, use.kernel, use.arch))
    if not uses:
        return []
    dynamic = {
        (job.source, name): size
        for job in jobs
        if job.rule == "nvcc" and plan.object_path(job).is_file()
        for name, size in dynamic_shared(_symbols(plan.object_path(job))).items()
    }
    heading = (
        "arch    registers  spilled B  in calls B  stack B  static shared B  dynamic shared B  ptxas s  "
        "source                        kernel"
    )
    lines = [f"fi_ops: {len(uses)} kernels (dynamic -: none, or chosen at the launch)", heading]
    for use, name in zip(uses, readable([use.kernel for use in uses]), strict=True):
        spilled = f"{use.spill_stores}+{use.spill_loads}" if use.spills else "0"
        lines.append(
            f"{use.arch:<7} {use.registers:>9}  {spilled:>9}  {use.called_spills:>10}  {use.stack:>7}  {use.shared:>15}  "
            f"{dynamic.get((use.source, name), '-'):>16}  {use.ptxas_seconds:>7.2f}  {use.source.name:<28}  {name}"
        )
    return lines


def summary(plan: Plan, compiled: list[Job], slowest: int = 5) -> list[str]:
    """The slowest files, by the compiler's own time; what nvcc warns of; kernels that spill or have a stack."""
    timed = [(_build.cpu_seconds(plan.object_path(job)) or 0.0, job.source.name) for job in compiled]
    timed.sort(reverse=True)
    lines = []
    if timed:
        lines.append("fi_ops: slowest files: " + ", ".join(f"{name} {took:.1f} s" for took, name in timed[:slowest]))
    for job in compiled:
        text = _log(plan, job).read_text()
        found = dict.fromkeys(
            line.strip() for line in text.splitlines() if re.search(r"\bwarning\b|Potential Performance", line)
        )
        lines += [f"fi_ops: {job.source.name}: {line}" for line in found]
    heavy = [use for use in plan_uses(plan, compiled) if use.spills or use.stack]
    for use, name in zip(heavy, readable([use.kernel for use in heavy]), strict=True):
        what = f"warning: spills {use.spill_stores} + {use.spill_loads} bytes" if use.spills else "has a stack frame"
        lines.append(
            f"fi_ops: {use.source.name} ({use.arch}): {what} ({use.stack} bytes of stack, {use.registers} registers): {name}"
        )
    return lines
