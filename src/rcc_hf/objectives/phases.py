# SPDX-License-Identifier: Apache-2.0
"""A curriculum: which ratios, numbers of segments and objectives are drawn, and until when."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

__all__ = ["Phase", "Phases"]

Key = TypeVar("Key", int, str)

_REQUIRED = ("ratios", "segments", "objectives")
_OF = ("ratios_of", "segments_of")
_FIELDS = ("until", *_REQUIRED, *_OF)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One stretch of the training, in which the same things are drawn.

    Attributes:
        until: Share of all steps at which it ends, 1 for the last one.
        ratios: Weight of each ratio.
        segments: Weight of each number of segments.
        objectives: Weight of each objective, by name.
        ratios_of: By objective, weights that take the place of `ratios` for it: at high ratios it takes more to write a
            text down than to find something in it.
        segments_of: The same for `segments`: what is written down of many segments is long, what is asked about them is
            short.

    Raises:
        ValueError: a value is out of range.
    """

    until: float = 1.0
    ratios: Mapping[int, float]
    segments: Mapping[int, float]
    objectives: Mapping[str, float]
    ratios_of: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    segments_of: Mapping[str, Mapping[int, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.until, (int, float)) or not 0 < self.until <= 1:
            raise ValueError(f"until is {self.until!r}; it must be a share of the steps above 0 and at most 1")
        for name in ("ratios", "segments", "objectives"):
            _check_weights(name, getattr(self, name))
        for of in _OF:
            for name, weights in getattr(self, of).items():
                _check_weights(f"{of} {name}", weights)
            unused = [name for name in getattr(self, of) if name not in self.objectives]
            if unused:
                raise ValueError(f"{of} names {', '.join(unused)}; the phase draws {', '.join(self.objectives)}")

    def ratios_for(self, objective: str) -> Mapping[int, float]:
        """Weight of each ratio of an objective."""
        return self.ratios_of.get(objective, self.ratios)

    def segments_for(self, objective: str) -> Mapping[int, float]:
        """Weight of each number of segments of an objective."""
        return self.segments_of.get(objective, self.segments)

    def draw(self, rng: np.random.Generator) -> tuple[str, int, int]:
        """Objective, number of segments and ratio."""
        objective = _draw(rng, self.objectives)
        return objective, _draw(rng, self.segments_for(objective)), _draw(rng, self.ratios_for(objective))


class Phases(Sequence[Phase]):
    """The phases of a training, in order.

    Args:
        phases: At least one; `until` increases, and that of the last one is 1.

    Raises:
        ValueError: they do not.
    """

    def __init__(self, phases: Iterable[Phase]):
        self._phases = tuple(phases)
        ends = [phase.until for phase in self._phases]
        if not ends or ends[-1] != 1:
            raise ValueError(f"phases end at {ends[-1] if ends else 'nothing'}; the last one must have until: 1")
        if any(first >= second for first, second in pairwise(ends)):
            raise ValueError(f"phases end at {', '.join(map(str, ends))}; each must end after the one before it")

    @classmethod
    def parse(cls, data: Any) -> "Phases":
        """Phases from what a YAML or JSON file holds: one mapping, or a list of them.

        Each has `ratios`, `segments`, `objectives` and, but for a last one, `until`. Instead of weights by name there
        may be a list, or a single value, of equal weights.

        Raises:
            ValueError: a field is missing, unknown or of another kind; the message has the number of the phase.
        """
        rows = [data] if isinstance(data, Mapping) else data
        if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows:
            raise ValueError(f"phases are {data!r}; give a list of mappings with {', '.join(_FIELDS)}")
        phases = []
        for number, row in enumerate(rows, 1):
            try:
                phases.append(_parse_phase(row))
            except ValueError as error:
                raise ValueError(f"phase {number}: {error}") from error
        return cls(phases)

    def check(self, segment_length: int, objectives: Collection[str]) -> None:
        """Refuse ratios that do not divide the segment length, and objectives that there are not.

        Raises:
            ValueError: there is such a one.
        """
        for number, phase in enumerate(self, 1):
            drawn = {ratio for name in phase.objectives for ratio in phase.ratios_for(name)}
            wrong = sorted(ratio for ratio in drawn if segment_length % ratio)
            if wrong:
                raise ValueError(
                    f"phase {number}: ratios {', '.join(map(str, wrong))} do not divide segment_length={segment_length}"
                )
            unknown = [name for name in phase.objectives if name not in objectives]
            if unknown:
                raise ValueError(
                    f"phase {number}: there is no objective {', '.join(unknown)}; there are {', '.join(objectives)}"
                )

    def at(self, progress: float) -> Phase:
        """The phase at a share of all steps: the first one that ends behind it."""
        return next((phase for phase in self if progress < phase.until), self._phases[-1])

    def __len__(self) -> int:
        return len(self._phases)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._phases[index]


def _check_weights(name: str, weights: Mapping[Any, float]) -> None:
    if not weights:
        raise ValueError(f"{name} are empty; give at least one, with a weight")
    for key, weight in weights.items():
        if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not 0 < weight < float("inf"):
            raise ValueError(f"{name}: the weight of {key} is {weight!r}; it must be a positive number")
        if isinstance(key, int) and key < 1:
            raise ValueError(f"{name}: {key} must be at least 1")


def _parse_phase(row: Any) -> Phase:
    if not isinstance(row, Mapping):
        raise ValueError(f"expected a mapping with {', '.join(_FIELDS)}, found {row!r}")
    unknown = [str(name) for name in row if name not in _FIELDS]
    missing = [name for name in _REQUIRED if name not in row]
    if unknown or missing:
        raise ValueError(
            f"{', '.join(unknown) or 'no field'} unknown, {', '.join(missing) or 'no field'} missing; the fields are "
            f"{', '.join(_FIELDS)}"
        )
    return Phase(
        until=row.get("until", 1.0),
        ratios=_weights("ratios", row["ratios"], _whole),
        segments=_weights("segments", row["segments"], _whole),
        objectives=_weights("objectives", row["objectives"], str),
        **{of: _weights_of(of, row.get(of, {})) for of in _OF},
    )


def _weights_of(of: str, value: Any) -> dict[str, dict[int, float]]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{of} is {value!r}; give weights by objective")
    return {str(name): _weights(f"{of} {name}", weights, _whole) for name, weights in value.items()}


def _weights(name: str, value: Any, convert: Callable[[Any], Key]) -> dict[Key, float]:
    if not isinstance(value, (Mapping, list, tuple, set)):
        value = [value]
    weights = dict(value) if isinstance(value, Mapping) else dict.fromkeys(value, 1.0)
    try:
        return {convert(key): weight for key, weight in weights.items()}
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _whole(value: Any) -> int:
    """A number from a file, where the keys of JSON are strings."""
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} is no whole number")
    return value


def _draw(rng: np.random.Generator, weights: Mapping[Key, float]) -> Key:
    """A key by its weight, whatever the order in which the keys stand."""
    keys = sorted(weights)
    shares = np.array([weights[key] for key in keys], dtype=np.float64)
    return keys[int(rng.choice(len(keys), p=shares / shares.sum()))]
