# SPDX-License-Identifier: Apache-2.0
"""The JSON file of a benchmark: written after every row, and gone on with where it is there already."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timing import CRASHED, FAILED, SKIPPED, UNAVAILABLE

Key = Mapping[str, Any]


class Record:
    """`setup` (what all rows share), `runs` (calls that measured, with versions and ceiling) and `rows`."""

    def __init__(self, file: Path, setup: Mapping[str, Any], run: Mapping[str, Any]):
        """Args:
        file: Where it is; its folder is made.
        setup: What must be equal for rows to stand in one table.
        run: About this call; rows that it measures refer to it.

        Raises:
            ValueError: the file is of another setup.
        """
        self.file = file
        self.data: dict[str, Any] = {"setup": dict(setup), "runs": [], "rows": []}
        if file.exists():
            self.data = json.loads(file.read_text(encoding="utf-8"))
            changed = [n for n in setup if json.loads(json.dumps(setup[n])) != self.data["setup"].get(n)]
            if changed:
                raise ValueError(
                    f"{file} was measured with another {', '.join(changed)} ("
                    f"{', '.join(str(self.data['setup'].get(n)) for n in changed)}); write to another file"
                )
        self.data["runs"].append(dict(run))

    def find(self, key: Key) -> dict[str, Any] | None:
        """The row of a key."""
        return next((row for row in self.data["rows"] if row["key"] == key), None)

    def is_done(self, key: Key, sides: Sequence[str] = ()) -> bool:
        """Whether a row need not be measured again: what failed or was skipped is tried again, but for crashes, and so
        is a row of which nothing was available, or one without some of the sides that are wanted."""
        row = self.find(key)
        if row is None:
            return False
        found = {side["status"] for side in row["sides"].values()}
        complete = found != {UNAVAILABLE} and not found & {FAILED, SKIPPED} and row["sides"].keys() >= set(sides)
        return CRASHED in found or complete

    def add(self, key: Key, sides: Mapping[str, Any]) -> dict[str, Any]:
        """Write a row, in place of one of the same key."""
        row = {"key": dict(key), "run": len(self.data["runs"]) - 1, "sides": dict(sides)}
        rows = [other for other in self.data["rows"] if other["key"] != key]
        self.data["rows"] = [*rows, row]
        self.write()
        return row

    def write(self) -> None:
        """Replace the file, whole or not at all."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        new = self.file.with_name(f".{self.file.name}")
        new.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        os.replace(new, self.file)
