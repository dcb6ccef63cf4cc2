"""The op registry: importing this package defines every `torch.ops.fi.*` op (schema and fake; no kernel is built)."""

import importlib
import pkgutil

from ._spec import SPECS, Cost, ErrorSample, OpSpec, Sample, schema_text

# One file an op family; the folder is the list. Underscored files hold no ops; `matrix` is a command.
for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_") and _module.name != "matrix":
        importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["SPECS", "Cost", "ErrorSample", "OpSpec", "Sample", "schema_text"]
