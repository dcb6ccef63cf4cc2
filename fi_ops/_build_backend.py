"""The PEP 517 build backend: setuptools, plus the native libraries when torch is at hand.

With torch importable in the build environment (`pip install --no-build-isolation .`) the wheel carries the compiled
CPU library and is tagged for this platform; also the CUDA library where FI_OPS_BUILD_CUDA=1 asks for it, or, without that
variable, where nvcc is there and torch is a CUDA build. Without torch the wheel is pure Python and kernels are compiled on
first use.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import sysconfig
import types
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (the backend's interface)
    build_editable,
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

# The builder without fi_ops/__init__.py, which imports torch: a build environment need not have it.
_package = types.ModuleType("fi_ops")
_package.__path__ = [str(Path(__file__).resolve().parent)]
sys.modules.setdefault("fi_ops", _package)
_build = importlib.import_module("fi_ops._build")
_build_cuda = importlib.import_module("fi_ops._build_cuda")


def _wants_cuda() -> bool:
    asked = os.environ.get("FI_OPS_BUILD_CUDA")
    if asked is not None:
        return asked not in ("", "0")
    try:
        _build_cuda.nvcc()
    except _build.BuildError:
        return False
    return bool(list((_build.torch_root() / "lib").glob("libtorch_cuda.*")))


def _add_library(device: str, library: Path, variant: str = "") -> None:
    _build.PREBUILT.mkdir(exist_ok=True)
    shutil.copy2(library, _build.PREBUILT / _build.prebuilt_name(device, variant))


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    shutil.rmtree(_build.PREBUILT, ignore_errors=True)
    try:
        try:
            _add_library("cpu", _build.build_cpu())
            if _wants_cuda():
                archs = _build_cuda.selected_archs()
                _add_library("cuda", _build_cuda.build_cuda(archs=archs), _build_cuda.prebuilt_variant(archs))
            platform_tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            config_settings = {**(config_settings or {}), "--build-option": f"--plat-name={platform_tag}"}
        except _build.BuildError as e:
            if os.environ.get("FI_OPS_BUILD_CUDA", "") not in ("", "0"):
                raise  # asked for by name: a wheel without it would be a surprise
            print(
                f"{e}\nfi_ops: making a wheel without the native library; it will be built on first use",
                file=sys.stderr,
            )
        return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    finally:
        shutil.rmtree(_build.PREBUILT, ignore_errors=True)
