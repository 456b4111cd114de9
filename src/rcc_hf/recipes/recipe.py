# SPDX-License-Identifier: Apache-2.0
"""What a recipe says, and how it is read from YAML."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from rcc_hf.objectives import Phases

__all__ = ["Recipe", "merge", "read_recipe"]

TINY = "tiny"
"""The field of a file whose values take the place of the others in a short trial run."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training that anyone can run again.

    Attributes:
        model: RCC checkpoint, or a base for a fresh compressor.
        compressor: Of a fresh one: fields of `RCCConfig` and options of the scheme.
        texts: Sources of documents as `read_documents` takes them, or folders of `rcc tokenize`.
        held_out: The same for the loss on text that is not trained on; none, and there is no such loss.
        questions: Files or data sets of questions with contexts and answers.
        chats: The same of conversations.
        objectives: By name: options of the objective, and its `type` where that is not its name.
        phases: The curriculum.
        training: Settings of `rcc train`.
    """

    model: str
    compressor: Mapping[str, Any] = field(default_factory=dict)
    texts: Sequence[str] = ()
    held_out: Sequence[str] = ()
    questions: Sequence[str] = ()
    chats: Sequence[str] = ()
    objectives: Mapping[str, Mapping[str, Any]]
    phases: Phases
    training: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, data: Any) -> "Recipe":
        """A recipe from what a YAML file holds.

        Raises:
            ValueError: a field is missing, unknown, or of another kind.
        """
        known = {one.name for one in fields(cls)}
        _check_names(data, known, required=("model", "objectives", "phases"))
        values = dict(data)
        for name in ("texts", "held_out", "questions", "chats"):
            values[name] = _as_list(name, values.get(name, ()))
        for name in ("compressor", "objectives", "training"):
            values[name] = _as_mapping(name, values.get(name) or {})
        values["objectives"] = {name: _as_mapping(name, row or {}) for name, row in values["objectives"].items()}
        if not values["objectives"]:
            raise ValueError("objectives are empty; name at least one")
        phases = Phases.parse(values["phases"])
        missing = sorted({name for phase in phases for name in phase.objectives} - set(values["objectives"]))
        if missing:
            raise ValueError(
                f"a phase draws {', '.join(missing)}, and objectives are {', '.join(values['objectives'])}"
            )
        return cls(**{**values, "phases": phases})

    def drawn(self) -> dict[str, Mapping[str, Any]]:
        """The objectives that a phase draws; making the others could take long."""
        names = {name for phase in self.phases for name in phase.objectives}
        return {name: options for name, options in self.objectives.items() if name in names}


def read_recipe(file: str | Path, *, tiny: bool = False) -> Recipe:
    """The recipe of a YAML file; paths in it are relative to where it is run from.

    Args:
        file: The file.
        tiny: Take the values of its field `tiny`, which go into mappings and take the place of all else.

    Raises:
        ValueError: the file is no recipe, or has no field `tiny`.
        OSError: the file cannot be read.
    """
    try:
        data = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {error}") from error
    try:
        data = dict(_as_mapping("a recipe", data))
        small = data.pop(TINY, None)
        if tiny and small is None:
            raise ValueError(f"there is no field {TINY}, with what is smaller in a trial run")
        return Recipe.parse(merge(data, _as_mapping(TINY, small)) if tiny else data)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def merge(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with changes, which go into mappings and take the place of all else."""
    merged = dict(data)
    for name, value in changes.items():
        old = merged.get(name)
        merged[name] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _check_names(data: Any, known: set[str], required: Sequence[str]) -> None:
    found = _as_mapping("a recipe", data)
    unknown = sorted(str(name) for name in found if name not in known)
    missing = [name for name in required if name not in found]
    if unknown:
        raise ValueError(f"there is no field {', '.join(unknown)}; the fields are {', '.join(sorted(known | {TINY}))}")
    if missing:
        raise ValueError(f"{', '.join(missing)} missing; a recipe needs {', '.join(required)}")


def _as_mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is {value!r}; expected names with values")
    return value


def _as_list(name: str, value: Any) -> list[str]:
    values = [value] if isinstance(value, str) else value or []
    if not isinstance(values, Sequence) or not all(isinstance(one, str) for one in values):
        raise ValueError(f"{name} is {value!r}; expected a source, or a list of them")
    return list(values)
