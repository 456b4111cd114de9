# SPDX-License-Identifier: Apache-2.0
"""Text for training: documents from files, cut into blocks of tokens that never span two documents."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from rcc_hf.objectives import reconstruction_example
from rcc_hf.prose import Split, load_prose

TEXT_SUFFIXES = (".txt", ".md")
BUNDLED: dict[str, Split] = {"prose": "train", "prose-held-out": "held_out"}


def read_documents(source: str) -> list[str]:
    """Texts, one per document.

    Args:
        source: "prose" or "prose-held-out" (public-domain books from an installable package); a file, where `.jsonl`
            has one `{"text": ...}` per line and `.txt` and `.md` are one document; or a folder of such files.

    Raises:
        ValueError: if there is nothing to read, or a line of a `.jsonl` file has no text.
    """
    if source in BUNDLED:
        return [document.text for document in load_prose(BUNDLED[source])]
    path = Path(source)
    if not path.exists():
        raise ValueError(f"{source} is neither a file or folder nor one of {', '.join(BUNDLED)}")
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    texts = [text for file in files for text in _read_file(file)]
    if not texts:
        raise ValueError(f"{source} holds no text; give {', '.join(TEXT_SUFFIXES)} or .jsonl files")
    return texts


def _read_file(file: Path) -> Iterator[str]:
    if file.suffix in TEXT_SUFFIXES:
        yield file.read_text(encoding="utf-8")
    elif file.suffix == ".jsonl":
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                row = json.loads(line) if line.strip() else None
                if row is None:
                    continue
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise ValueError(f'{file}, line {number}: expected {{"text": ...}}, found {line.strip()[:80]!r}')
                yield row["text"]


class TokenBlocks(Dataset):
    """Contexts of a fixed number of tokens for reconstruction.

    A document's last block ends where the document ends, overlapping the one before, so that no token is left out.
    Documents shorter than a block are left out; `num_short` counts them.
    """

    def __init__(
        self,
        texts: Iterable[str],
        tokenizer: Callable,
        block_length: int,
        prompt_ids: list[int],
        progress: bool = True,
    ):
        """Tokenize `texts` into blocks of `block_length` tokens.

        Raises:
            ValueError: if no document is long enough.
        """
        self.block_length, self.prompt_ids = block_length, prompt_ids
        self.documents: list[Tensor] = []
        self.starts: list[tuple[int, int]] = []
        self.num_short = 0
        for text in tqdm(list(texts), desc="Tokenizing", unit="document", disable=not progress):
            ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
            if len(ids) < block_length:
                self.num_short += 1
                continue
            last = len(ids) - block_length
            self.starts += [(len(self.documents), s) for s in {*range(0, last, block_length), last}]
            self.documents.append(ids)
        self.starts.sort()
        if not self.starts:
            raise ValueError(
                f"all {self.num_short} documents have less than {block_length} tokens; give longer documents, or train "
                "with a shorter context"
            )

    def __len__(self) -> int:
        return len(self.starts)

    def context(self, index: int) -> Tensor:
        """The ids of one block, `[block_length]`."""
        document, start = self.starts[index]
        return self.documents[document][start : start + self.block_length]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return reconstruction_example(self.context(index), self.prompt_ids)
