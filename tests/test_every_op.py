"""The registry sweep: every op, every sample, by its spec. Nothing here names an op; new ones are swept by existing."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
import torch.fx.experimental._config
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from fi_ops import _build, _load
from fi_ops.library import SPECS
from fi_ops.testing import (
    assert_op_matches_reference,
    clone_sample,
    comparable,
    copy_values,
    deviation,
    outputs_of,
    upcast,
)

GPUS = [torch.device("cuda:0")] if torch.cuda.is_available() else []
DEVICES = [torch.device("cpu"), *GPUS]

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# The first compares values, for which torch has no kernels in fp8 (`test_numerics` compares all that a call leaves alone).
OPCHECK_UTILS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")

# {(op, check): reason}: empty at best. An entry whose check passes is an error too.
KNOWN_FAILURES: dict[tuple[str, str], str] = {}


def cases(*axes, devices=DEVICES):
    """`spec` x `device` (x dtype) as pytest parameters, known failures marked so that an unexpected pass fails."""

    def decorate(fn):
        check = fn.__name__.removeprefix("test_")  # the key in KNOWN_FAILURES
        params = []
        for name, spec in SPECS.items():
            for device in devices:
                for dtype in spec.dtypes if "dtype" in axes else (None,):
                    reason = KNOWN_FAILURES.get((name, check))
                    marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
                    marks += [pytest.mark.gpu] if device.type == "cuda" else []
                    label = "-".join(
                        filter(None, (name, device.type, str(dtype).removeprefix("torch.") if dtype else ""))
                    )
                    values = (spec, device, dtype) if "dtype" in axes else (spec, device)
                    params.append(pytest.param(*values, id=label, marks=marks))
        return pytest.mark.parametrize(("spec", "device", "dtype") if "dtype" in axes else ("spec", "device"), params)(
            fn
        )

    return decorate


def samples_of(spec, device, dtype):
    samples = list(spec.samples(device, dtype))
    assert samples, f"fi::{spec.name} has no samples for {dtype}"
    return samples


@cases("dtype")
def test_numerics(spec, device, dtype):
    for sample in samples_of(spec, device, dtype):
        assert_op_matches_reference(spec, sample)


def assert_same(actual, expected, what):
    """Bit for bit the same outputs, by name."""
    assert actual.keys() == expected.keys(), what
    for name, value in expected.items():
        assert torch.equal(comparable(value), comparable(actual[name])), f"{what}: {name} differs"


@cases("dtype")
def test_deterministic_and_thread_invariant(spec, device, dtype):
    threads = torch.get_num_threads()
    try:
        for sample in samples_of(spec, device, dtype):
            results = []
            for count in (1, threads + 1, 3):
                torch.set_num_threads(count)
                results.append(outputs_of(spec, spec.overload, clone_sample(sample)))
            for other in results[1:]:
                assert_same(other, results[0], f"fi::{spec.name} [{sample.name}], called again with other threads")
    finally:
        torch.set_num_threads(threads)


@cases()
def test_opcheck(spec, device):
    dtype = spec.dtypes[0]
    for sample in samples_of(spec, device, dtype):
        if any(value.isnan().any() for value in outputs_of(spec, spec.overload, clone_sample(sample)).values()):
            continue  # opcheck takes NaN for a difference
        utils = OPCHECK_UTILS[1:] if any(t.dtype in FP8 for t in _tensors(sample)) else OPCHECK_UTILS
        torch.library.opcheck(spec.overload, sample.args, sample.kwargs, test_utils=utils)


@cases()
def test_fake_agrees_in_metadata(spec, device):
    """Sizes, strides, dtype and device of every output, for every sample and dtype, without running a kernel."""
    for dtype in spec.dtypes:
        for sample in samples_of(spec, device, dtype):
            real = outputs_of(spec, spec.overload, clone_sample(sample))
            with FakeTensorMode() as mode:
                fake = outputs_of(spec, spec.overload, sample.map_tensors(mode.from_tensor))
            for name, value in real.items():
                other = fake[name]
                assert (value.shape, value.stride(), value.dtype, value.device) == (
                    other.shape, other.stride(), other.dtype, other.device,
                ), f"fi::{spec.name} [{sample.name}]: the fake's {name} differs"  # fmt: skip


def _resized(sample, factor: int):
    """The sample with its batch-like leading dimension repeated, where every tensor shares one; None where that's not so."""
    tensors = [t for t in (*sample.args, *sample.kwargs.values()) if isinstance(t, torch.Tensor)]
    leading = tensors[0].shape[0] if tensors and tensors[0].dim() > 1 else 0
    if leading < 2:
        return None

    def grow(t):
        return torch.cat([t] * factor) if t.dim() > 0 and t.shape[0] == leading else t.clone()

    return sample.map_tensors(grow)


@cases()
@torch.fx.experimental._config.patch(use_duck_shape=False)  # else sizes that are equal by chance are one symbol
def test_compile_fullgraph_dynamic(spec, device):
    """Compiled equals eager, with dynamic shapes, and a second size needs no second compile."""
    dtype = spec.dtypes[0]
    sample = samples_of(spec, device, dtype)[0]
    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(spec.overload, fullgraph=True, dynamic=True, backend=count)
    compiles = None
    for trial in (sample, _resized(sample, 2), _resized(sample, 3)):
        if trial is None:
            continue
        expected = outputs_of(spec, spec.overload, clone_sample(trial))
        actual = outputs_of(spec, compiled, clone_sample(trial))
        assert_same(actual, expected, f"fi::{spec.name} under torch.compile")
        compiles = (
            compiles or count.frame_count
        )  # the first call may try more than once (floats are specialised on a retry)
        assert count.frame_count == compiles, "a second size was compiled anew"


def _refusal(call) -> str:
    with pytest.raises(RuntimeError) as caught:
        call()
    return str(caught.value).splitlines()[0]


@cases()
def test_bad_input(spec, device):
    """Each error sample is refused before anything is written, with the same text in eager and under fake tensors."""
    samples = list(spec.errors(device))
    assert samples, f"fi::{spec.name} has no error samples"
    for sample in samples:
        if sample.needs_values and not _values_are_checked(device):
            continue
        tensors = [t for t in (*sample.args, *sample.kwargs.values()) if isinstance(t, torch.Tensor) and not t.is_meta]
        before = [t.detach().clone() for t in tensors]
        eager = _refusal(lambda s=sample: spec.overload(*s.args, **s.kwargs))
        assert eager.startswith(f"fi::{spec.name}: ") and re.search(sample.match, eager), (
            f"eager says: {eager}\nexpected: {sample.match}"
        )
        for t, old in zip(tensors, before, strict=True):
            assert torch.equal(comparable(t), comparable(old)), f"wrote to an argument before refusing: {eager}"
        if not sample.needs_values:
            with FakeTensorMode() as mode:

                def fake(v, mode=mode):
                    return mode.from_tensor(v) if isinstance(v, torch.Tensor) else v

                args, kwargs = [fake(v) for v in sample.args], {k: fake(v) for k, v in sample.kwargs.items()}
                assert _refusal(lambda a=args, k=kwargs: spec.overload(*a, **k)) == eager


def _values_are_checked(device) -> bool:
    """On the CPU always; on CUDA, where it costs a sync, only in a process that was started under FI_OPS_CHECK=1."""
    return device.type == "cpu" or os.environ.get("FI_OPS_CHECK") == "1"


def _sweep_again(select: str, **env) -> None:
    """Run the tests of this file that `select` picks in a process with other environment variables."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", select]
    run = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)
    assert run.returncode == 0, f"with {env}:\n{run.stdout[-4000:]}{run.stderr[-1000:]}"


def test_complete():
    """Every overload in torch.ops.fi has a spec, and every spec a kernel on each device, a docstring and a cost."""
    registered = {n.removeprefix("fi::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("fi::")}
    assert registered == set(SPECS)
    for device in DEVICES:
        _load.load(device.type)
        key = device.type.upper()
        for name in SPECS:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fi::{name}", key), f"fi::{name} has no {key} kernel"
    for name, spec in SPECS.items():
        assert spec.doc, f"fi::{name} has no docstring"
        for sample in samples_of(spec, torch.device("cpu"), spec.dtypes[0]):
            assert spec.cost(*sample.args, **sample.kwargs).bytes >= 0


def _machine_levels() -> list[str]:
    """The ISA levels below this machine's best that its library has (the best one is what every other test runs)."""
    script = "import fi_ops; print(fi_ops.cpu_isa())"
    best = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    names = [isa.name for isa in _build.isa_levels()]
    return names[: names.index(best)]


@pytest.mark.parametrize("isa", _machine_levels() if not os.environ.get("FI_OPS_CPU_ISA") else [])
def test_lower_isa_levels(isa):
    """The numerics of the whole sweep again, in a process that is held to a lower ISA level."""
    _sweep_again("test_numerics and cpu", FI_OPS_CPU_ISA=isa)


# ---------------------------------------------------------------------------------------------------- what only a GPU can show


def _seeded_samples(spec, device, dtype, seed):
    torch.manual_seed(seed)
    return samples_of(spec, device, dtype)


def _tensors(sample):
    return [v for v in (*sample.args, *sample.kwargs.values()) if isinstance(v, torch.Tensor)]


@cases("dtype", devices=GPUS)
def test_graph_capture(spec, device, dtype):
    """Captured once and replayed on other values, an op does what it does in eager on those: nothing was read on the host."""
    pairs = zip(*(_seeded_samples(spec, device, dtype, seed) for seed in (1, 2)), strict=True)
    for sample, other in pairs:
        what = f"fi::{spec.name} [{sample.name}] replayed"
        expected = [outputs_of(spec, spec.overload, clone_sample(s)) for s in (other, sample)]
        static = clone_sample(sample)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = outputs_of(spec, spec.overload, static)
        for values, wanted in zip((other, sample), expected, strict=True):
            for mine, theirs in zip(_tensors(static), _tensors(values), strict=True):
                copy_values(mine, theirs)
            graph.replay()
            assert_same(captured, wanted, what)


@cases("dtype", devices=GPUS)
def test_two_streams(spec, device, dtype):
    """The same op at once on two streams, on other values each: calls share no scratch and no state."""
    pairs = zip(*(_seeded_samples(spec, device, dtype, seed) for seed in (1, 2)), strict=True)
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    for pair in pairs:
        expected = [outputs_of(spec, spec.overload, clone_sample(s)) for s in pair]
        calls = [(side, clone_sample(pair[side])) for _ in range(4) for side in (0, 1)]
        torch.cuda.synchronize()
        results = []
        for side, sample in calls:
            with torch.cuda.stream(streams[side]):
                results.append((side, outputs_of(spec, spec.overload, sample)))
        torch.cuda.synchronize()
        for side, actual in results:
            assert_same(actual, expected[side], f"fi::{spec.name} [{pair[side].name}] on stream {side}")


@cases("dtype", devices=GPUS)
def test_cpu_and_cuda_agree(spec, device, dtype):
    """The two devices' results on the same values are no further apart than their budgets together allow."""
    for sample in samples_of(spec, torch.device("cpu"), dtype):
        on_cpu = outputs_of(spec, spec.overload, clone_sample(sample))
        on_cuda = outputs_of(spec, spec.overload, clone_sample(sample, device))
        same = outputs_of(spec, spec.reference, clone_sample(sample))
        exact = outputs_of(spec, spec.reference, clone_sample(sample).map_tensors(upcast))
        for name, value in on_cpu.items():
            where, other = f"fi::{spec.name} [{sample.name}]: {name}", on_cuda[name].cpu()
            assert (value.shape, value.dtype) == (other.shape, other.dtype), where
            if spec.exact or not value.dtype.is_floating_point:
                assert torch.equal(value, other), f"{where} differs"
            else:
                limit = (
                    deviation(value, exact[name], same[name]).limit + deviation(other, exact[name], same[name]).limit
                )
                apart = (value.double() - other.double()).nan_to_num(0.0, 0.0, 0.0).abs()  # infinities: compared above
                assert apart.numel() == 0 or apart.max().item() <= limit, f"{where}: {apart.max().item()} > {limit}"


@pytest.mark.gpu
def test_values_are_refused_under_fi_ops_check():
    """With FI_OPS_CHECK=1 what is wrong in a tensor's data is refused on CUDA too, in the same words as on the CPU."""
    _sweep_again("test_bad_input and cuda", FI_OPS_CHECK="1")
