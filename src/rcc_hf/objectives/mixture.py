# SPDX-License-Identifier: Apache-2.0
"""A data set of all examples of a training, each a function of the seed and its index."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from rcc_hf.objectives.base import Objective, Shape
from rcc_hf.objectives.checks import check_positive
from rcc_hf.objectives.phases import Phases

__all__ = ["Mixture"]

_GROUPS, _EXAMPLES = 0, 1


class Mixture(Dataset):
    """Examples of several objectives, mixed by a curriculum.

    It is random by itself, so it is read in order, and to resume is to go on at an index. The examples of one
    micro-batch of a process, a group, have objective, ratio and number of segments in common; other groups of a step
    have others.

    Args:
        objectives: By name.
        phases: What is drawn when.
        seed: Other examples for another one.
        num_steps: Optimizer steps.
        examples_per_step: Of all processes and accumulated batches.
        group_size: Examples of one micro-batch of a process; divides `examples_per_step`.
        segment_length: Of the model.

    Raises:
        ValueError: a number is out of range, a ratio does not divide the segment length, or an objective is unknown.
    """

    is_shuffled = True
    """`train` reads it in its order."""

    def __init__(
        self,
        objectives: Mapping[str, Objective],
        phases: Phases,
        *,
        seed: int,
        num_steps: int,
        examples_per_step: int,
        group_size: int,
        segment_length: int,
    ):
        numbers = {"num_steps": num_steps, "examples_per_step": examples_per_step, "group_size": group_size}
        for name, value in (numbers | {"segment_length": segment_length}).items():
            check_positive(name, value)
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must not be negative")
        if examples_per_step % group_size:
            raise ValueError(
                f"group_size={group_size} does not divide examples_per_step={examples_per_step}: a step must consist "
                "of whole micro-batches"
            )
        phases.check(segment_length, list(objectives))
        self._objectives, self._phases, self._seed = dict(objectives), phases, seed
        self._num_steps, self._examples_per_step, self._group_size = num_steps, examples_per_step, group_size
        self._segment_length = segment_length

    def __len__(self) -> int:
        return self._num_steps * self._examples_per_step

    def plan(self, index: int) -> tuple[str, Shape]:
        """Objective and shape of an example, the same for its group.

        Raises:
            IndexError: there is no such example.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is not one of the {len(self)} examples")
        group = index // self._group_size
        phase = self._phases.at(index // self._examples_per_step / self._num_steps)
        name, num_segments, ratio = phase.draw(np.random.default_rng([self._seed, _GROUPS, group]))
        return name, Shape(num_segments=num_segments, segment_length=self._segment_length, ratio=ratio)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, shape = self.plan(index)
        rng = np.random.default_rng([self._seed, _EXAMPLES, index])
        return {**self._objectives[name].example(rng, shape), "ratio": shape.ratio, "objective": name}
