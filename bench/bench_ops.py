"""Every op of the registry on its first (typical) sample, against its reference in eager torch.

Samples are small: this is about call cost and about gross mistakes, not about bandwidth. On CUDA a second line of ours
replays captured calls: what the kernel takes without its launch from Python.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fi_ops.library import SPECS
from fi_ops.testing import clone_sample

from .harness import Candidate, Case, Options


def cases(options: Options) -> Iterator[Case]:
    for spec in SPECS.values():
        dtype = options.dtype if options.dtype in spec.dtypes else spec.dtypes[0]
        sample = next(iter(spec.samples(torch.device(options.device), dtype)))
        mine, theirs = clone_sample(sample), clone_sample(sample)

        def ours(s=mine, f=spec.overload):
            return f(*s.args, **s.kwargs)

        candidates = [
            Candidate("reference, eager", lambda s=theirs, f=spec.reference: f(*s.args, **s.kwargs), capture=False),
            Candidate("fi_ops", ours, ours=True, capture=False),
        ]
        if options.device == "cuda":
            candidates.append(Candidate("fi_ops, captured", ours, ours=True))
        yield Case(
            f"{spec.name} [{sample.name}], {str(dtype).removeprefix('torch.')}",
            candidates,
            spec.cost(*sample.args, **sample.kwargs),
        )
