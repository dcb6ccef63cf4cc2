"""Linear layers of a decode step, against torch's own, eager and compiled: few rows, so the weights are what is read.

The shapes are those of the models of `bench models`. Calls go over copies of the weights that no cache holds.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from fi_ops.library import SPECS

from . import stock
from .harness import Candidate, Case, Options, copies_beyond_caches, within_budget

SPEC = SPECS["linear"]

# (out_features, in_features): query, key and value fused; key alone; output; gate; down; lm_head
SHAPES = {
    "cpu": [(1536, 1024), (256, 1024), (1024, 1024), (2816, 1024), (1024, 2816), (32000, 1024)],
    "cuda": [(6144, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336), (128256, 4096)],
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def _linear(input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(input, weight)


def cases(options: Options) -> Iterator[Case]:
    shapes = SHAPES[options.device][2:3] if options.quick else SHAPES[options.device]
    for dtype in [options.dtype] if options.dtype else DTYPES:
        for rows in (options.batch,) if options.batch else (1, 8) if options.quick else (1, 8, 16):
            for out_features, in_features in shapes:
                x = torch.randn(rows, in_features, device=options.device).to(dtype)
                weight = (torch.randn(out_features, in_features, device=options.device) * in_features**-0.5).to(dtype)
                copies = copies_beyond_caches((x, weight), weight.nbytes)
                exact = SPEC.reference(x.double(), weight.double())
                name = str(dtype).removeprefix("torch.")
                yield Case(
                    f"[{out_features}, {in_features}], B={rows}, {name}",
                    [
                        *stock.eager_and_compiled("torch linear", _linear, copies, options),
                        Candidate("fi_ops", SPEC.overload, ours=True, inputs=copies),
                    ],
                    SPEC.cost(x, weight),
                    within_budget(exact, SPEC.reference(x, weight)),
                    dtype,
                )
