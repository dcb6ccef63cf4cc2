"""Shared set-up: seeds, GPU skipping, and which devices the sweep runs on."""

from __future__ import annotations

import pytest
import torch

import fi_ops  # noqa: F401  (defines torch.ops.fi)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20260)
