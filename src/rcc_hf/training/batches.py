# SPDX-License-Identifier: Apache-2.0
"""From examples to batches, with what a step needs to know about labels: on the CPU, where the device need not wait."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import default_data_collator

from rcc_hf.training.losses import predicting_places

__all__ = ["Batches", "Collator", "collate_equal"]

Example = dict[str, Any]
Collator = Callable[[Sequence[Example]], dict[str, Any]]


def collate_equal(examples: Sequence[Example]) -> dict[str, Any]:
    """A batch of examples of one length; `ratio` and `objective` are those that all of them have.

    Raises:
        ValueError: ratios or objectives differ.
    """
    batch: dict[str, Any] = {}
    for name in ("ratio", "objective"):
        found = {example[name] for example in examples if name in example}
        if len(found) > 1:
            raise ValueError(f"a batch has examples of {name} {sorted(found)}; it must have one")
        if found:
            batch[name] = found.pop()
    tensors = [{k: v for k, v in example.items() if k not in ("ratio", "objective")} for example in examples]
    return batch | default_data_collator(tensors)


class Batches:
    """Makes batches with a collator, and adds where tokens are predicted: `label_places` and `teacher_places`.

    Masks of padding behind the last token are left out: attention is causal, so no token sees that padding, and without
    a mask there are faster kernels and nothing to wait for.

    Args:
        collate: Makes a batch of examples.
        multiple: Places are a multiple of so many, so that batches have fewer shapes; those of a teacher, as many, go
            in pairs with those of labels.
        teacher: Whether to keep what is for a teacher.
    """

    def __init__(self, collate: Collator = collate_equal, *, multiple: int = 1, teacher: bool = True):
        self.collate, self.multiple, self.teacher = collate, multiple, teacher

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        batch = self.collate(examples)
        if not self.teacher:
            batch = {name: value for name, value in batch.items() if not name.startswith("teacher_")}
        for labels, places in (("labels", "label_places"), ("teacher_labels", "teacher_places")):
            if labels in batch:
                batch[places] = predicting_places(batch[labels], self.multiple)
        for name in ("attention_mask", "teacher_mask"):
            if name in batch and bool((batch[name][:, :-1] >= batch[name][:, 1:]).all()):
                del batch[name]
        return batch
