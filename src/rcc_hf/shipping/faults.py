# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint must not be shipped with."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rcc_hf.modeling import modeling_rcc

__all__ = ["MOST_BYTES", "faults"]

MOST_BYTES = 32_000_000
"""Weights of a checkpoint in a repository of code."""

_TRAINING_SUFFIXES = (".bin", ".pt", ".pth")
_TRAINING_FILES = ("all_results.json", "eval_results.json", "mixture.json", "train_results.json", "trainer_state.json")


def faults(folder: Path, *, most_bytes: int = MOST_BYTES) -> list[str]:
    """What is wrong with a checkpoint, in words; nothing, if it can be shipped.

    Args:
        folder: Of the checkpoint.
        most_bytes: Limit of its weights.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = []
    if not config.get("adapter_only") or not config.get("base_fingerprint"):
        found.append("it is no adapter-only checkpoint that knows its base by a fingerprint")
    places = list(dict.fromkeys(_absolute_paths(config)))
    if places:
        found.append(f"its base lies at {', '.join(places)}, on one machine; name it")
    left = [file.name for file in sorted(folder.iterdir()) if _is_of_training(file)]
    if left:
        found.append(f"{', '.join(left)} are of its training")
    own = {file.name: file.read_bytes() for file in Path(modeling_rcc.__file__).parent.glob("*.py")}
    old = [file.name for file in sorted(folder.glob("*.py")) if own.get(file.name) != file.read_bytes()]
    if old:
        found.append(f"its code is not that of modeling/: {', '.join(old)}; renew it with renew_code")
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if size > most_bytes:
        found.append(f"its weights have {size} bytes, at most {most_bytes} are shipped")
    return found


def _is_of_training(file: Path) -> bool:
    is_checkpoint = file.is_dir() and file.name.startswith("checkpoint-")
    return is_checkpoint or file.suffix in _TRAINING_SUFFIXES or file.name in _TRAINING_FILES


def _absolute_paths(value: Any) -> Iterator[str]:
    """Strings anywhere in a configuration that are places on a machine."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _absolute_paths(inner)
    elif isinstance(value, str) and Path(value).is_absolute():
        yield value
