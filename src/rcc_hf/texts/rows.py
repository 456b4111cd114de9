# SPDX-License-Identifier: Apache-2.0
"""Rows of JSON-lines files and data sets, each with its place for messages, and checks of their values."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rcc_hf.texts.datasets_rows import PREFIX, DatasetRows

__all__ = ["expect", "read_rows", "rows_as"]

Made = TypeVar("Made")


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON-lines file, each with "file, line number" for messages; blank lines are skipped.

    Raises:
        ValueError: a line is no JSON object, or no UTF-8.
    """
    with Path(path).open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:
                raise ValueError(f"{place}: no JSON in UTF-8 ({error}); it begins {_begin(line)}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{place}: expected an object, found {_begin(line)}")
            yield place, row


def rows_as(make: Callable[[Mapping[str, Any]], Made], source: str | Path) -> Iterator[Made]:
    """What `make` makes of each row of a `.jsonl` file or a `datasets:` source.

    Raises:
        ValueError: a row is none of them, and the message has its place; or there is none.
        OSError: there is no such file or data set.
    """
    is_empty = True
    for place, row in _rows(source):
        is_empty = False
        try:
            made = make(row)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        yield made
    if is_empty:
        raise ValueError(f"{source} holds no rows; expected one JSON object a line")


def _rows(source: str | Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not str(source).startswith(PREFIX):
        if Path(source).suffix != ".jsonl":
            raise ValueError(f"{source} is no .jsonl file; give one, or {PREFIX}NAME for a data set")
        return read_rows(source)
    rows = DatasetRows.parse(str(source))
    if rows.field is not None:
        raise ValueError(f"{source}: field is for texts; here all columns of a row are read")
    return iter(rows)


def expect(name: str, value: Any, is_right: bool, allowed: str) -> None:
    """Refuse a value that is not right.

    Raises:
        ValueError: it is not; the message has name, value and what is allowed.
    """
    if not is_right:
        raise ValueError(f"{name} is {str(value)[:80]!r} ({type(value).__name__}); it must be {allowed}")


def _begin(line: bytes) -> str:
    return repr(line.strip().decode("utf-8", "replace")[:80])
