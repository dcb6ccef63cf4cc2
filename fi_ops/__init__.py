"""FlashInfer-class LLM inference kernels that live inside `torch.compile`.

    import fi_ops; fi_ops.enable()
    model = torch.compile(model)        # nothing else changes

Importing defines `torch.ops.fi.*` (schemas and fakes) and the functions with FlashInfer's names below. It compiles nothing and
changes nothing global: native kernels load, or are compiled, on the first call of an op; the rewrites start with `enable()`.
"""

from __future__ import annotations

import torch as _torch

if tuple(int(part) for part in _torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
    raise ImportError(f"fi_ops needs torch 2.11 or newer, got {_torch.__version__}; pip install 'torch>=2.11'")

from . import library as library
from ._load import cpu_isa as cpu_isa
from .activation import *  # noqa: F403
from .attention import *  # noqa: F403
from .cascade import *  # noqa: F403
from .decode import *  # noqa: F403
from .gemm import *  # noqa: F403
from .logits import *  # noqa: F403
from .mla import *  # noqa: F403
from .norm import *  # noqa: F403
from .page import *  # noqa: F403
from .pod import *  # noqa: F403
from .prefill import *  # noqa: F403
from .quantization import *  # noqa: F403
from .rope import *  # noqa: F403
from .sampling import *  # noqa: F403
from .sparse import *  # noqa: F403

__version__ = "0.1.0"

# Functions of the rewrite layer, imported on first use so that `import fi_ops` does not import Inductor.
_INDUCTOR = ("enable", "disable", "enabled", "explain")


def __getattr__(name: str):
    if name in _INDUCTOR:
        from . import inductor

        return getattr(inductor, name)
    raise AttributeError(f"module 'fi_ops' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_INDUCTOR])
