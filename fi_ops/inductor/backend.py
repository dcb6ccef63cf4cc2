"""`torch.compile(model, backend="fi")`: the default Inductor with the rewrites switched on for this function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .manager import switched


def fi(
    graph: torch.fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: dict | None = None
):
    """The backend. `mode` and `options` are those of the inductor backend, and may be given together."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = dict(list_mode_options(mode)) if mode not in (None, "default") else {}
    patches.update({key.replace("-", "_"): setting for key, setting in (options or {}).items()})
    with switched(True):
        return compile_fx(graph, example_inputs, config_patches=patches or None)
