"""The programs in the documentation of serving run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def programs(file: str, section: str = "") -> list[str]:
    """The Python blocks of a file, or of its section of this title."""
    text = (ROOT / file).read_text()
    if section:
        text = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize(
    ("file", "section", "count"), [("README.md", "Serving: batches and pages", 1), ("docs/serving.md", "", 4)]
)
def test_programs_run(file, section, count):
    """The blocks of a page, one after the other, in one namespace."""
    blocks, names = programs(file, section), {}
    assert len(blocks) == count
    for block in blocks:
        exec(compile(block, file, "exec"), names)
        assert isinstance(names["out"], torch.Tensor) and names["out"].isfinite().all()
