"""Every op of the registry on its first (typical) sample, against its reference in eager torch.

Samples are small: this is about call cost and about gross mistakes, not about bandwidth.
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
        yield Case(
            f"{spec.name} [{sample.name}], {str(dtype).removeprefix('torch.')}",
            [
                Candidate("reference, eager", lambda s=theirs, f=spec.reference: f(*s.args, **s.kwargs)),
                Candidate("fi_ops", lambda s=mine, f=spec.overload: f(*s.args, **s.kwargs), ours=True),
            ],
            spec.cost(*sample.args, **sample.kwargs),
        )
