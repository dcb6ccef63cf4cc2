"""Shared set-up: seeds, GPU skipping, and which devices the sweep runs on."""

from __future__ import annotations

import pytest
import torch

import fi_ops  # noqa: F401  (defines torch.ops.fi)
from fi_ops import _load


def pytest_addoption(parser):
    parser.addoption(
        "--emulate-cuda",
        action="store_true",
        help="run CPU tensors through the emulated CUDA kernels (tests/emulation)",
    )


def pytest_configure(config):
    if config.getoption("--emulate-cuda"):
        from emulation import build as emulation

        library = emulation.build()
        torch.ops.load_library(str(library))
        _load._loaded["cpu"] = library


def pytest_collection_modifyitems(config, items):
    if config.getoption("--emulate-cuda"):
        for item in items:
            spec = item.callspec.params.get("spec") if hasattr(item, "callspec") else None
            if "cuda" not in getattr(spec, "devices", ("cuda",)):
                item.add_marker(pytest.mark.skip(reason="no CUDA kernel"))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20260)
