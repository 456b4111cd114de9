# SPDX-License-Identifier: Apache-2.0
"""Documents, one at a time: from text files, JSON lines, folders of them, the bundled prose, and data sets."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcc_hf.prose import Split, load_prose
from rcc_hf.texts.datasets_rows import PREFIX, DatasetRows
from rcc_hf.texts.rows import read_rows

__all__ = ["BUNDLED", "Document", "listed_files", "read_documents"]

BUNDLED: dict[str, Split] = {"prose": "train", "prose-held-out": "held_out"}
WHOLE_SUFFIXES = (".txt", ".md")
SUFFIXES = (*WHOLE_SUFFIXES, ".jsonl", ".parquet")


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        place: Where it was found, for messages: the same whenever the same source is read.
        text: All of it.
    """

    place: str
    text: str


def read_documents(*sources: str | Path) -> Iterator[Document]:
    """Documents of all sources, in order; those of folders by the names of their files. One at a time is in memory.

    Args:
        sources: Each is one of

            - `prose` or `prose-held-out`: public-domain books from an installable package;
            - a file: `.txt` and `.md` are one document, `.jsonl` has one `{"text": ...}` a line, `.parquet` a column
              `text`;
            - a folder of such files, at any depth; others in it are left out;
            - `datasets:NAME?config=...&split=train&field=text&data_files=...&data_dir=...&revision=...`: a data set
              that the library `datasets` reads, with the defaults shown. `NAME` is an id on the Hub, a folder, or a
              format (`datasets:json?data_files=*.json.gz`).

    Raises:
        ValueError: at once, if there is no such source; while reading, if one holds no document, or a row has no text.
        OSError: a data set is not found, or not reached.
        ModuleNotFoundError: what the source needs is not installed.
    """
    if not sources:
        raise ValueError("there is no source; give files, folders, or names of data sets")
    return _documents([(source, _open(source)) for source in sources])


def listed_files(folder: str | Path, listing: str | Path) -> list[str]:
    """Paths of the files of a folder that a text file names, one a line; blank lines are skipped.

    Raises:
        ValueError: one of them is not there, is named twice, or is none that `read_documents` reads; or none is named.
    """
    found: list[str] = []
    for number, line in enumerate(Path(listing).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        file = Path(folder, line.strip())
        if str(file) in found or not file.is_file() or file.suffix not in SUFFIXES:
            what = "named twice" if str(file) in found else f"no file that ends in {', '.join(SUFFIXES)}"
            raise ValueError(f"{listing}, line {number}: {file} is {what}")
        found.append(str(file))
    if not found:
        raise ValueError(f"{listing} names no files; give one path a line, relative to {folder}")
    return found


def _open(source: str | Path) -> Iterable[Document]:
    """Its documents, read when they are asked for."""
    name, path = str(source), Path(source)
    if name in BUNDLED:
        return _of_prose(BUNDLED[name])
    if name.startswith(PREFIX):
        return _of_rows(DatasetRows.parse(name))
    if path.is_dir():
        return (document for file in sorted(path.rglob("*")) if file.is_file() for document in _of_file(file))
    if not path.exists():
        if path.suffix in SUFFIXES:
            raise ValueError(f"there is no file {source}")
        raise ValueError(f"{source} is neither a file or folder nor one of {', '.join(BUNDLED)}, nor {PREFIX}NAME")
    return _of_file(path)


def _documents(opened: Iterable[tuple[str | Path, Iterable[Document]]]) -> Iterator[Document]:
    for source, documents in opened:
        is_empty = True
        for document in documents:
            is_empty = False
            yield document
        if is_empty:
            raise ValueError(f"{source} holds no text; give files that end in {', '.join(SUFFIXES)}, with text in them")


def _of_prose(split: Split) -> Iterator[Document]:
    yield from (Document(book.title, book.text) for book in load_prose(split))


def _of_file(file: Path) -> Iterator[Document]:
    if file.suffix in WHOLE_SUFFIXES:
        try:
            yield Document(str(file), file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no text in UTF-8 ({error}); convert it, or leave it out") from error
    elif file.suffix == ".jsonl":
        for place, row in read_rows(file):
            yield Document(place, _text(row, "text", place))
    elif file.suffix == ".parquet":
        yield from _of_rows(DatasetRows("parquet", data_files=str(file)))


def _of_rows(rows: DatasetRows) -> Iterator[Document]:
    for place, row in rows:
        yield Document(place, _text(row, rows.field or "text", place))


def _text(row: Mapping[str, Any], field: str, place: str) -> str:
    if field not in row:
        raise ValueError(
            f'{place}: expected {{"{field}": ...}}, found {", ".join(row) or "nothing"}; another column is named as in '
            f"{PREFIX}json?data_files=FILE&field=NAME"
        )
    if not isinstance(row[field], str):
        raise ValueError(f'{place}: "{field}" is {str(row[field])[:80]!r} ({type(row[field]).__name__}), not a string')
    return str(row[field])
