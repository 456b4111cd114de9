# SPDX-License-Identifier: Apache-2.0
"""Blocks: documents in memory, cut into contexts of one length for reconstruction, the same ones in every epoch."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from rcc_hf.objectives import reconstruction_example

__all__ = ["TokenBlocks"]


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
        for text in tqdm(texts, desc="Tokenizing", unit="document", disable=not progress):
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
