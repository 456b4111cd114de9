# SPDX-License-Identifier: Apache-2.0
"""Rows of a data set of the library `datasets`, streamed: from the Hub, a folder, or files that it can read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from rcc_hf.optional import import_optional

__all__ = ["PREFIX", "DatasetRows"]

PREFIX = "datasets:"


@dataclass(frozen=True)
class DatasetRows:
    """Rows of one split, of which no more than a few are in memory.

    Attributes:
        name: Id on the Hub, folder, or a format such as `parquet` and `json`, which `data_files` then has.
        config: Which configuration (subset), where there are several.
        split: Which split.
        field: The column with the text; None: `text`.
        data_files: Path, URL or pattern.
        data_dir: A folder inside the data set.
        revision: Branch, tag or commit on the Hub.
    """

    name: str
    config: str | None = None
    split: str = "train"
    field: str | None = None
    data_files: str | None = None
    data_dir: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, source: str) -> "DatasetRows":
        """From `datasets:NAME?config=...&split=...&field=...&data_files=...&data_dir=...&revision=...`.

        All behind the name may be left out. Nothing is decoded, so a value has no `&`.

        Raises:
            ValueError: it is of another form.
        """
        name, _, rest = source.removeprefix(PREFIX).partition("?")
        known = [item.name for item in fields(cls) if item.name != "name"]
        options: dict[str, str] = {}
        for part in filter(None, rest.split("&")):
            key, _, value = part.partition("=")
            if key not in known or not value or key in options:
                raise ValueError(
                    f"{source}: {part!r} is not understood; write {PREFIX}NAME?KEY=VALUE&..., where KEY is one of "
                    f"{', '.join(known)}, each once"
                )
            options[key] = value
        if not name:
            raise ValueError(f"{source} names no data set; write {PREFIX}NAME, an id on the Hub or a folder")
        return cls(name, **options)

    def __str__(self) -> str:
        given = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "name"}
        options = "&".join(f"{key}={value}" for key, value in given.items() if value not in (None, "train"))
        return f"{PREFIX}{self.name}{options and '?'}{options}"

    def __iter__(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Place, for messages, and row.

        Raises:
            ModuleNotFoundError: `datasets` is not installed.
            OSError: the data set is not found, or not reached.
            ValueError: it has no such configuration or split.
        """
        loaded = import_optional("datasets", "train").load_dataset(
            self.name,
            self.config,
            split=self.split,
            data_files=self.data_files,
            data_dir=self.data_dir,
            revision=self.revision,
            streaming=True,
        )
        for number, row in enumerate(loaded, 1):
            yield f"{self}, row {number}", row
