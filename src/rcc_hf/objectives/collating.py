# SPDX-License-Identifier: Apache-2.0
"""Puts examples together to a batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rcc_hf.objectives.base import IGNORED

__all__ = ["collate"]

_PADDED = ("input_ids", "teacher_ids")
_LABELS = ("labels", "teacher_labels")
_SHARED = ("ratio", "objective")


def collate(
    examples: Sequence[Mapping[str, Any]], pad_id: int, *, multiple: int = 1, most: int | None = None
) -> dict[str, Tensor | int | str | None]:
    """A batch of examples, padded on the right.

    Local tokens have no mask: padding behind them is seen by none, has no label, and a mask would keep attention from
    its fastest kernels.

    Args:
        examples: As objectives or a mixture make them; all with the same keys, ratio and objective.
        pad_id: At padding.
        multiple: Pad local tokens and teacher to a multiple of so many, and up to 16 times of it to one of 4 times as
            many, so that batches have few shapes.
        most: But to no more than so many, unless an example is longer.

    Returns:
        `input_ids`, `labels` `[B, T]`; `context_ids` `[B, N]`, with `context_mask` only if contexts differ in length or
        have masks; where there is a teacher `teacher_ids`, `teacher_labels` `[B, U]`; of long texts `sequence_ids`
        `[B, T * W]` instead of `input_ids` and `context_ids`; `ratio` and `objective` as they are.

    Raises:
        ValueError: there is no example, or they differ in keys, ratio or objective.
    """
    _check_alike(examples)
    batch: dict[str, Any] = {name: examples[0][name] for name in _SHARED if name in examples[0]}
    for name in _LABELS:
        if name in examples[0]:
            batch[name] = _pad([example[name] for example in examples], IGNORED, multiple, most)
    for name in _PADDED:
        if name in examples[0]:
            batch[name] = _pad([example[name] for example in examples], pad_id, multiple, most)
    if "context_ids" in examples[0]:
        batch |= _contexts(examples, pad_id)
    if "sequence_ids" in examples[0]:
        batch["sequence_ids"] = torch.stack([example["sequence_ids"] for example in examples])
    return batch


def _contexts(examples: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """Contexts, with a mask unless all of it is ones."""
    rows = [example["context_ids"] for example in examples]
    masks = [example.get("context_mask", torch.ones_like(row)) for example, row in zip(examples, rows, strict=True)]
    mask = _pad(masks, 0, 1)
    return {"context_ids": _pad(rows, pad_id, 1)} | ({} if bool(mask.all()) else {"context_mask": mask})


def _check_alike(examples: Sequence[Mapping[str, Any]]) -> None:
    if not examples:
        raise ValueError("there is no example to make a batch of")
    for name in _SHARED:
        values = {example.get(name) for example in examples}
        if len(values) > 1:
            raise ValueError(
                f"the examples of a batch have different values of {name}: {', '.join(sorted(map(str, values)))}; make "
                "group_size of the mixture a multiple of the batch size"
            )
    keys = {tuple(sorted(set(example) - {"context_mask"})) for example in examples}
    if len(keys) > 1:
        raise ValueError(f"the examples of a batch have different keys: {' and '.join(map(str, sorted(keys)))}")


def _pad(rows: Sequence[Tensor], value: int, multiple: int, most: int | None = None) -> Tensor:
    longest = max(map(len, rows))
    if multiple > 1 and longest <= 16 * multiple:
        multiple *= 4
    width = -(-longest // multiple) * multiple
    if most is not None and width > most:
        width = max(longest, most)
    padded = rows[0].new_full((len(rows), width), value)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded
