"""The PEP 517 build backend: setuptools, plus the native library when torch is at hand.

With torch importable in the build environment (`pip install --no-build-isolation .`) the wheel carries the compiled
library and is tagged for this platform. Without it the wheel is pure Python and kernels are compiled on first use.
"""

from __future__ import annotations

import shutil
import sys
import sysconfig

import _build
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


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    shutil.rmtree(_build.PREBUILT, ignore_errors=True)
    try:
        try:
            library = _build.build_cpu()
            _build.PREBUILT.mkdir()
            shutil.copy2(library, _build.PREBUILT / f"libfi_ops_cpu-{_build.source_hash()}.so")
            platform_tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            config_settings = {**(config_settings or {}), "--build-option": f"--plat-name={platform_tag}"}
        except _build.BuildError as e:
            print(
                f"{e}\nfi_ops: making a wheel without the native library; it will be built on first use",
                file=sys.stderr,
            )
        return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    finally:
        shutil.rmtree(_build.PREBUILT, ignore_errors=True)
