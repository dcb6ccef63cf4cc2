"""Shared set-up: seeds, GPU skipping, and which devices the sweep runs on."""

from __future__ import annotations

import collections
import os
import zlib

import pytest
import torch

import fi_ops  # noqa: F401  (defines torch.ops.fi)
from fi_ops import _load


def pytest_addoption(parser):
    parser.addoption(
        "--emulate-cuda",
        nargs="?",
        const="sm80",
        choices=["sm80", "sm90"],
        help="run CPU tensors through the emulated CUDA kernels (tests/emulation), those of Hopper too with --emulate-cuda=sm90",
    )
    parser.addoption("--one-in", type=int, default=1, metavar="N", help="an Nth of each test's cases")


def pytest_configure(config):
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:  # threads of several processes that wait for each other's cores are many times slower
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    if emulated := config.getoption("--emulate-cuda"):
        from emulation import build as emulation

        os.environ["FI_EMULATION_CAPABILITY"] = emulated.removeprefix("sm")
        library = emulation.build()
        torch.ops.load_library(str(library))
        _load._loaded["cpu"] = library


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available() and not config.getoption("--emulate-cuda"):
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    if (step := config.getoption("--one-in")) > 1:
        one_in(step, items, config)


def one_in(step, items, config):
    """Leave a `step`-th of each test's cases, at least one: those whose names have the lowest checksums.

    Spread so over all parameters, whatever `step` is; every fifth or sixth would be of one dtype where those alternate.
    """
    tests = collections.defaultdict(list)
    for item in items:
        if not item.get_closest_marker("skip"):
            tests[item.nodeid.partition("[")[0]].append(item)
    kept = set()
    for cases in tests.values():
        cases.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
        kept.update(cases[: -(-len(cases) // step)])
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20260)


@pytest.fixture(autouse=True)
def _emulated_gpu(request, monkeypatch):
    if not (request.config.getoption("--emulate-cuda") and "gpu" in request.keywords):
        yield
        return
    from emulation.no_gpu import emulated_gpu

    with emulated_gpu(monkeypatch):
        yield
