# SPDX-License-Identifier: Apache-2.0
"""What a model card says about a training, as a person writes it down in a YAML file."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

__all__ = ["DataSource", "TrainingFacts", "check_steps", "read_facts"]


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One set of texts or questions.

    Attributes:
        name: As people know it.
        license: Its terms.
        use: What it was used for, and how much of it.
        url: Where it is.
        hub: Its id on the Hub, for the header of the card.
    """

    name: str
    license: str
    use: str
    url: str | None = None
    hub: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """What cannot be read from the checkpoint.

    Attributes:
        title: Of the card.
        summary: A sentence or two below it.
        base_model: Id of the base on the Hub.
        license: Of the weights, as the Hub names it.
        recipe: The file that was run.
        steps: Optimizer steps.
        source_tokens: Tokens that were compressed, over all steps.
        gpu_minutes: On all GPUs together.
        hardware: What they were.
        data: What it was trained on.
        language: Of the data, two letters each.
        tags: Of the card, beside those that all have.
        limits: What to be warned of, a sentence each.
    """

    title: str
    summary: str
    base_model: str
    license: str
    recipe: str
    steps: int
    source_tokens: float
    gpu_minutes: float
    hardware: str
    data: tuple[DataSource, ...]
    language: tuple[str, ...] = ("en",)
    tags: tuple[str, ...] = ()
    limits: tuple[str, ...] = field(default=())


def read_facts(file: str | Path) -> TrainingFacts:
    """The facts of a YAML file, whose names are the attributes.

    Raises:
        ValueError: a field is missing, unknown, or of another kind.
        OSError: the file cannot be read.
    """
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {error}") from error
    values = _check_names(TrainingFacts, content, str(file))
    for name in ("steps", "source_tokens", "gpu_minutes"):
        if isinstance(values[name], bool) or not isinstance(values[name], (int, float)) or values[name] <= 0:
            raise ValueError(f"{file}: {name} is {values[name]!r}; expected a number above 0")
    for name in ("data", "language", "tags", "limits"):
        if name in values:
            if not isinstance(values[name], list):
                raise ValueError(f"{file}: {name} is {values[name]!r}; expected a list")
            values[name] = tuple(values[name])
    rows = (_check_names(DataSource, row, f"{file}: data") for row in values["data"])
    return TrainingFacts(**{**values, "data": tuple(DataSource(**row) for row in rows)})


def check_steps(facts: TrainingFacts, source: str | Path) -> None:
    """Refuse facts of another training than the one whose output this is.

    Raises:
        ValueError: the output says that it has taken another number of steps.
    """
    for name, key in (("mixture.json", "max_steps"), ("trainer_state.json", "global_step")):
        file = Path(source) / name
        found = json.loads(file.read_text(encoding="utf-8")).get(key) if file.exists() else facts.steps
        if found != facts.steps:
            raise ValueError(f"{file} says {found} steps, and the facts say {facts.steps}; give those of this training")


def _check_names(kind: type, content: Any, where: str) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} is {content!r:.60}; expected names with values")
    known = {one.name: one.default is MISSING for one in fields(kind)}
    unknown = sorted(str(name) for name in content if name not in known)
    missing = sorted(name for name, is_required in known.items() if is_required and name not in content)
    if unknown or missing:
        problems = [
            f"{title} {', '.join(names)}" for title, names in (("unknown:", unknown), ("missing:", missing)) if names
        ]
        raise ValueError(f"{where}: {'; '.join(problems)}. The fields are {', '.join(known)}")
    return dict(content)
