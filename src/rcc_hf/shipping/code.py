# SPDX-License-Identifier: Apache-2.0
"""Gives shipped checkpoints the code of today, without a touch on their weights."""

from pathlib import Path

from transformers.dynamic_module_utils import custom_object_save

from rcc_hf.modeling.configuration_rcc import RCCConfig
from rcc_hf.modeling.modeling_rcc import RCCForCausalLM

__all__ = ["renew_code"]


def renew_code(folder: str | Path) -> list[str]:
    """Replace the code in a checkpoint by that of `modeling/`, and say which files are others now.

    Args:
        folder: Of the checkpoint.

    Raises:
        ValueError: the folder holds no checkpoint with code.
    """
    folder = Path(folder)
    before = {file.name: file.read_bytes() for file in folder.glob("*.py")}
    if not before or not (folder / "config.json").exists():
        raise ValueError(
            f"{folder} is no folder of a checkpoint with its code; name one with config.json and .py files"
        )
    for name in before:
        (folder / name).unlink()
    for kind in (RCCConfig, RCCForCausalLM):
        custom_object_save(kind, str(folder))
    after = {file.name: file.read_bytes() for file in folder.glob("*.py")}
    return sorted(name for name in before | after if before.get(name) != after.get(name))
