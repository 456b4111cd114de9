# SPDX-License-Identifier: Apache-2.0
"""Packed sequences: several documents in one row, told apart by positions that begin anew."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Document = tuple[int, int, int]
"""Row, first column, and the column behind the last one."""


def find_documents(position_ids: Tensor | None, mask: Tensor | None) -> list[Document] | None:
    """The documents of packed rows; None if every row is one.

    Args:
        position_ids: `[B, T]` (or `[1, T]`), or None.
        mask: `[B, T]`, 0 at padding.

    Raises:
        ValueError: if rows are both packed and masked: the library takes such rows for single documents.
    """
    if position_ids is None or position_ids.shape[-1] < 2:
        return None
    starts = position_ids.diff(dim=-1) != 1
    if mask is not None:
        real = mask[:, -position_ids.shape[-1] :].bool()
        starts = starts & (real[:, 1:] & real[:, :-1])
    if not bool(starts.any()):
        return None
    if mask is not None:
        raise ValueError(
            "position_ids begin anew within a row (packed sequences), and there is an attention_mask: documents of a "
            "row would read each other. Leave the mask out, or give each document a row of its own"
        )
    documents, width = [], position_ids.shape[-1]
    for row, columns in enumerate(starts):
        edges = [0, *(columns.nonzero().flatten() + 1).tolist(), width]
        documents += [(row, first, last) for first, last in pairwise(edges)]
    return documents


def split_documents(inputs: Tensor, documents: list[Document]) -> tuple[Tensor, Tensor]:
    """Every document as a row of its own, padded behind, and the mask `[N, T]`."""
    rows = [inputs[row, first:last] for row, first, last in documents]
    lengths = torch.tensor([len(row) for row in rows], device=inputs.device)
    mask = torch.arange(int(lengths.max()), device=inputs.device) < lengths[:, None]
    return pad_sequence(rows, batch_first=True), mask.long()


def join_documents(outputs: Tensor, documents: list[Document], batch_size: int) -> Tensor:
    """Outputs `[N, T, D]` of the documents, put back into the packed rows `[B, T, D]`."""
    rows: list[list[Tensor]] = [[] for _ in range(batch_size)]
    for output, (row, first, last) in zip(outputs, documents, strict=True):
        rows[row].append(output[: last - first])
    return torch.stack([torch.cat(parts) for parts in rows])
