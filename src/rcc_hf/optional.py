# SPDX-License-Identifier: Apache-2.0
"""Imports packages that only some of the library needs, with an error that says how to get them."""

import importlib
from types import ModuleType

__all__ = ["import_optional"]


def import_optional(module: str, extra: str = "eval") -> ModuleType:
    """The imported module.

    Raises:
        ModuleNotFoundError: it is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{module} needs the package {error.name}, which is not installed. "
            f"Install what this uses with: pip install 'rcc_hf[{extra}]'",
            name=error.name,
        ) from error
