# SPDX-License-Identifier: Apache-2.0
"""Refuses options of objectives that are out of range."""

__all__ = ["check_positive", "check_share"]


def check_positive(name: str, value: int) -> None:
    """Refuse what is no whole number of at least 1.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")


def check_share(name: str, value: float) -> None:
    """Refuse what is no share.

    Raises:
        ValueError: it is not.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value!r}; it must lie between 0 and 1")
