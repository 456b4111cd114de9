# SPDX-License-Identifier: Apache-2.0
"""Writes the compressor of a training's output anew, with today's code, without leftovers and places of one machine."""

import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedConfig

from rcc_hf.checkpoints import ensure_reconstruction_prompt, load_model, load_tokenizer
from rcc_hf.shipping.faults import MOST_BYTES, faults

__all__ = ["pack"]


def pack(
    source: str | Path, output: str | Path, *, base: str = "smollm2", card: str = "", most_bytes: int = MOST_BYTES
) -> None:
    """Make a folder to ship of an adapter-only checkpoint; it appears complete or not at all.

    Args:
        source: What `rcc train` wrote.
        output: The folder, which must not exist.
        base: By which users find the base: an id on the Hub, or "smollm2".
        card: Text of its README.md.
        most_bytes: Limit of its weights.

    Raises:
        ValueError: the output exists, the source is not one of this base, or the folder would have faults.
    """
    source, output = Path(source), Path(output)
    if output.exists():
        raise ValueError(f"{output} exists; remove it, or name another folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        folder = Path(scratch) / output.name
        _write(source, folder, base)
        (folder / "README.md").write_text(card, encoding="utf-8")
        _check_weights(source, folder)
        found = faults(folder, most_bytes=most_bytes)
        if found:
            raise ValueError(f"{source} cannot be shipped: {'; '.join(found)}")
        for file in folder.iterdir():  # weights are written for their owner alone
            file.chmod(0o644)
        shutil.move(folder, output)


def _write(source: Path, folder: Path, base: str) -> None:
    trained_on = PreTrainedConfig.get_config_dict(source)[0].get("base_fingerprint")
    model = load_model(str(source), base=base)
    tokenizer = load_tokenizer(model, str(source), base)
    ensure_reconstruction_prompt(model, tokenizer)
    model.config.base_model_name_or_path = base
    model.config.text_config._name_or_path = base
    model.config.use_cache = True  # the Trainer switches it off
    model.save_pretrained(folder, adapter_only=True)
    tokenizer.save_pretrained(folder)
    found = PreTrainedConfig.get_config_dict(folder)[0]["base_fingerprint"]
    if found != trained_on:
        raise ValueError(f"{source} was trained on a base with the fingerprint {trained_on}; that of {base} is {found}")


def _check_weights(source: Path, folder: Path) -> None:
    """Refuse weights that were changed on the way, such as by a dtype that is not theirs."""
    old, new = ({name: t for file in sorted(place.glob("*.safetensors")) for name, t in load_file(file).items()}
                for place in (source, folder))  # fmt: skip
    changed = [name for name in old.keys() | new.keys() if not _are_equal(old.get(name), new.get(name))]
    if changed:
        raise ValueError(
            f"the weights of {source} are not those that would be shipped, beginning with {min(changed)}; save the "
            "checkpoint in the dtype of its configuration"
        )


def _are_equal(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    return first is not None and second is not None and first.dtype == second.dtype and torch.equal(first, second)
