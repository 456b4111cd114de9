# SPDX-License-Identifier: Apache-2.0
"""The memory schemes that exist, by name."""

from dataclasses import asdict, fields

from .memory import MemoryScheme
from .memory_rcc import RCCScheme
from .memory_uio import UIOScheme

SCHEMES: dict[str, type[MemoryScheme]] = {scheme.name: scheme for scheme in (RCCScheme, UIOScheme)}


def scheme_class(name: str) -> type[MemoryScheme]:
    """The class of a scheme.

    Raises:
        ValueError: if there is no scheme of that name.
    """
    if name not in SCHEMES:
        raise ValueError(f"scheme={name!r} is not known; the schemes are {', '.join(sorted(SCHEMES))}")
    return SCHEMES[name]


def option_names(name: str) -> tuple[str, ...]:
    """What the options of a scheme are called."""
    return tuple(field.name for field in fields(scheme_class(name).Options))


def complete_options(name: str, given: dict | None) -> dict:
    """The scheme's options with defaults filled in, so that a checkpoint pins them.

    Raises:
        ValueError: if a value is out of range.
        TypeError: if an option is not known.
    """
    given, known = dict(given or {}), option_names(name)
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise TypeError(f"scheme {name!r} has no option {', '.join(unknown)}; its options are {', '.join(known)}")
    return asdict(scheme_class(name).Options(**given))


def make_scheme(name: str, options: dict) -> MemoryScheme:
    """A scheme with the given options."""
    scheme = scheme_class(name)
    return scheme(scheme.Options(**complete_options(name, options)))
