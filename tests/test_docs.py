"""The README's generated parts and its promises that a test can hold."""

from __future__ import annotations

import re
from pathlib import Path

from fi_ops import _build
from fi_ops.library import SPECS, matrix

ROOT = Path(__file__).resolve().parent.parent


def test_support_matrix_is_current():
    text = (ROOT / "README.md").read_text()
    assert matrix.replaced(text) == text, "run `make docs`"


def test_bindings_serve_every_device():
    """What the matrix rests on: a binding registers under whichever device it is compiled for, and every op is bound."""
    for path in (_build.CSRC / "binding").glob("*.cpp"):
        assert set(re.findall(r"LIBRARY_IMPL\(fi, (\w+)", path.read_text())) <= {"FI_DEVICE"}, path
    assert matrix.bound_ops() == set(SPECS)


def test_no_hand_written_file_is_long():
    """Hand-written files stay under about 600 lines."""
    files = [p for ext in ("py", "h", "cpp", "cu", "cuh") for p in ROOT.glob(f"*/**/*.{ext}")]
    own = [p for p in files if not {".venv", ".venvs", "build", ".git"} & set(p.relative_to(ROOT).parts)]
    long = {str(p.relative_to(ROOT)): n for p in own if (n := len(p.read_text().splitlines())) > 620}
    assert not long, f"split these: {long}"
