"""fi_ops: FlashInfer-class LLM inference kernels that live inside `torch.compile`.

    import fi_ops; fi_ops.enable()
    model = torch.compile(model)        # nothing else changes

Importing defines `torch.ops.fi.*` (schemas and fakes). Native kernels load, or are compiled, on the first call.
"""

from __future__ import annotations

import torch

if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
    raise ImportError(f"fi_ops needs torch 2.11 or newer, got {torch.__version__}; pip install 'torch>=2.11'")

from . import library  # noqa: E402  (defines the ops)

__version__ = "0.1.0"
