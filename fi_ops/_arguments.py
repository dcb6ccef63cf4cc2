"""Argument handling that the public functions share."""

from __future__ import annotations

from typing import Any, NoReturn

import torch


def require(function: str, condition: bool, message: str) -> None:
    """RuntimeError in the package's format unless `condition` holds."""
    if not condition:
        refuse(function, message)


def refuse(function: str, message: str) -> NoReturn:
    """RuntimeError in the package's format."""
    raise RuntimeError(f"fi_ops.{function}: {message}")


def refuse_pdl(function: str, enable_pdl: bool | None) -> None:
    """`enable_pdl` is in FlashInfer's signatures; True asks for a CUDA launch attribute that no kernel here has."""
    require(
        function,
        not enable_pdl,
        "enable_pdl must be None or False, got True; programmatic dependent launch is not there in this version, leave it out",
    )


def return_in(function: str, out: torch.Tensor | None, result: torch.Tensor, name: str = "out") -> torch.Tensor:
    """`result`, written into `out` (the argument `name`) where one is given (same shape, dtype and device)."""
    if out is None:
        return result
    if out.shape != result.shape or out.dtype != result.dtype or out.device != result.device:
        refuse(
            function,
            f"{name} must be {list(result.shape)} of {result.dtype} on {result.device}, got {list(out.shape)} of {out.dtype} on "
            f"{out.device}; leave it out to have it made",
        )
    return out.copy_(result)


def array_or_number(value, default) -> tuple[torch.Tensor | None, Any]:
    """A parameter that is a number or a tensor with one for each row, as the two arguments that ops have for it."""
    return (value, default) if isinstance(value, torch.Tensor) else (None, value)
