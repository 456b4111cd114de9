# SPDX-License-Identifier: Apache-2.0
"""The compressor's adapters as LoRA folders of PEFT, and LoRA folders of PEFT as a start for them.

PEFT itself is not needed: a folder is `adapter_config.json` and `adapter_model.safetensors`.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import cached_file

from rcc_hf.modeling.adapters_rcc import LowRankAdapter, adapter_key
from rcc_hf.modeling.families_rcc import family_of
from rcc_hf.modeling.modeling_rcc import RCCForCausalLM, RCCModel

__all__ = ["Part", "from_peft_lora", "to_peft_lora"]

Part = Literal["read", "write"]
"""The adapters that are on while the decoder reads memory, or while the compressor writes it."""

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

_TENSOR = re.compile(r"(?P<module>(?:.*\.)?layers\.(?P<layer>\d+)\.(?P<linear>.+))\.lora_(?P<side>[AB])\.weight")
_VARIANTS = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config"),
    *("use_bdlora", "use_dora", "use_qalora"),
)
_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")  # the others change the base's weights too


def to_peft_lora(model: RCCForCausalLM | RCCModel, folder: str | os.PathLike, *, part: Part = "read") -> None:
    """Write one kind of the compressor's adapters as a LoRA that `PeftModel.from_pretrained` puts on the base.

    The base with it computes what the decoder computes with these adapters on in every row, which without memory they
    are not. Slot maps have no place in a LoRA: this is no way to save a compressor.

    Args:
        model: the model, out of PEFT's wrapper.
        folder: where it is written.
        part: "read" or "write".

    Raises:
        TypeError: if `model` is no RCC model.
        ValueError: if `part` is neither, or the model has no such adapters.
    """
    layers = _layers(model, part)
    prefix = f"base_model.model.{family_of(model.config.text_config).backbone}.layers"
    tensors, adapters = {}, {}
    for index, name, adapter in _adapters(layers, part):
        adapters[index, name] = adapter
        tensors[f"{prefix}.{index}.{name}.lora_A.weight"] = adapter.down.detach().contiguous()
        tensors[f"{prefix}.{index}.{name}.lora_B.weight"] = adapter.up.detach().contiguous()
    if not adapters:
        raise ValueError(f"this model has no {part} adapters ({part}_rank is 0), so there is nothing to write")
    _refuse_meta(adapters.values())
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / WEIGHTS_FILE, metadata={"format": "pt"})
    config = _describe(model, adapters, len(layers))
    (target / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def from_peft_lora(model: RCCForCausalLM | RCCModel, source: str | os.PathLike, *, part: Part) -> None:
    """Let one kind of the compressor's adapters begin as a LoRA of PEFT.

    They then compute its update exactly (up to the model's dtype). A LoRA of smaller rank fills the first rows; the
    others keep their input side and begin with no effect. So do adapters of linear maps that the LoRA leaves out. The
    write adapters have none in the last layer, whose output is no state: that part of a LoRA is left out.

    Args:
        model: the model, out of PEFT's wrapper; it is changed.
        source: the LoRA, as id on the Hub or folder.
        part: "read" or "write".

    Raises:
        TypeError: if `model` is no RCC model.
        ValueError: if `part` is neither, there is no LoRA at `source`, its update is no plain low-rank one, or the
            adapters have no place for it.
    """
    layers = _layers(model, part)
    adapters = {(index, name): adapter for index, name, adapter in _adapters(layers, part)}
    _refuse_meta(adapters.values())
    config, pairs = _read_lora(source)
    if part == "write":
        pairs = {place: pair for place, pair in pairs.items() if place[0] != len(layers) - 1}
    for place, (module, down, up) in pairs.items():
        _check_fit(adapters.get(place), module, down, up, part, source)
    for place, adapter in adapters.items():
        adapter.up.zero_()
        if place in pairs:
            module, down, up = pairs[place]
            factor = _scale(config, module, len(down)) / adapter.scale
            adapter.down[: len(down)] = down.to(adapter.down)
            adapter.up[:, : len(down)] = (up.double() * factor).to(adapter.up)


def _layers(model: nn.Module, part: str) -> nn.ModuleList:
    if part not in get_args(Part):
        raise ValueError(f"part={part!r} is not known; choose one of {', '.join(get_args(Part))}")
    if not isinstance(model, (RCCForCausalLM, RCCModel)):
        raise TypeError(
            f"model must be an RCCForCausalLM or RCCModel, not a {type(model).__name__}; take it out of PEFT's wrapper "
            "with merge_and_unload() or unload()"
        )
    backbone = model.model if isinstance(model, RCCForCausalLM) else model
    return backbone.language_model.layers


def _adapters(layers: nn.ModuleList, part: str) -> Iterator[tuple[int, str, LowRankAdapter]]:
    """Layer, dotted name of the linear map in it, and its adapter."""
    for index, layer in enumerate(layers):
        own = getattr(cast(nn.Module, layer.rcc), part)
        for name, _ in layer.named_modules():
            if adapter_key(name) in own:
                yield index, name, own[adapter_key(name)]


def _describe(
    model: RCCForCausalLM | RCCModel, adapters: dict[tuple[int, str], LowRankAdapter], num_layers: int
) -> dict[str, Any]:
    """The `adapter_config.json` of adapters by layer and name."""
    first, indices = next(iter(adapters.values())), sorted({index for index, _ in adapters})
    alpha = len(first.down) * first.scale
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.config.base_model_name_or_path,
        "r": len(first.down),
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name for _, name in adapters}),
        "layers_to_transform": None if len(indices) == num_layers else indices,
        "inference_mode": True,
    }


def _refuse_meta(adapters: Iterable[LowRankAdapter]) -> None:
    if any(adapter.down.device.type == "meta" for adapter in adapters):
        raise ValueError("adapters that are offloaded to disk cannot be read or set; load the model on a device")


def _read_lora(source: str | os.PathLike) -> tuple[dict[str, Any], dict[tuple[int, str], tuple[str, Tensor, Tensor]]]:
    """The configuration, and by layer and name of the linear map: its full name, A `[R, in]` and B `[out, R]`."""
    if Path(source).is_dir() and not (Path(source) / CONFIG_FILE).is_file():
        raise ValueError(f"{source} is no LoRA folder of PEFT: it has no {CONFIG_FILE}")
    config = json.loads(Path(str(cached_file(source, CONFIG_FILE))).read_text())
    _check_plain(config, source)
    if Path(source).is_dir() and not (Path(source) / WEIGHTS_FILE).is_file():
        raise ValueError(f"{source} has no {WEIGHTS_FILE}; load it in PEFT and save it again, which writes one")
    sides: dict[tuple[int, str], dict[str, Tensor]] = {}
    modules, foreign = {}, []
    for key, tensor in load_file(str(cached_file(source, WEIGHTS_FILE))).items():
        match = _TENSOR.fullmatch(key)
        if match is None:
            foreign.append(key)
            continue
        place = int(match["layer"]), match["linear"]
        sides.setdefault(place, {})[match["side"]] = tensor
        modules[place] = match["module"].removeprefix("base_model.model.")
    foreign += [modules[place] for place, found in sides.items() if len(found) < 2]
    if foreign or not sides:
        raise ValueError(
            f"the LoRA at {source} is more than A and B of linear maps in decoder layers, which is all that the "
            f"adapters can take up; it has {sorted(foreign)[:5] or 'no tensors'}"
        )
    return config, {place: (modules[place], found["A"], found["B"]) for place, found in sides.items()}


def _check_plain(config: dict[str, Any], source: str | os.PathLike) -> None:
    """Refuse an adapter whose update of a linear map is not `scale * B @ A`."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"the adapter at {source} is a {kind} one; only LORA can be taken up")
    variants = [name for name in _VARIANTS if config.get(name)]
    if variants:
        raise ValueError(
            f"the LoRA at {source} was made with {', '.join(variants)}, so its update is no plain low-rank one; merge "
            "it into the base with merge_and_unload() and make the compressor on that"
        )
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise ValueError(
            f"the LoRA at {source} was initialised by {init!r}, which changes the base's weights as well; save it with "
            "save_pretrained(path_initial_model_for_weight_conversion=...) of PEFT, which makes it a plain LoRA"
        )


def _check_fit(
    adapter: LowRankAdapter | None, module: str, down: Tensor, up: Tensor, part: str, source: str | os.PathLike
) -> None:
    if adapter is None:
        raise ValueError(
            f"the LoRA at {source} adapts {module}, where this model has no {part} adapter; give {part}_rank and "
            "targets to from_base so that it has one"
        )
    rank, width, height = len(down), down.shape[1], up.shape[0]
    if (width, height) != (adapter.down.shape[1], adapter.up.shape[0]) or up.shape[1] != rank:
        raise ValueError(
            f"the LoRA at {source} is of another base: at {module} A is {tuple(down.shape)} and B {tuple(up.shape)}, "
            f"and this base maps {adapter.down.shape[1]} to {adapter.up.shape[0]}"
        )
    if rank > len(adapter.down):
        raise ValueError(
            f"the LoRA at {source} has rank {rank} at {module}, and the {part} adapters have {len(adapter.down)}; "
            f"give {part}_rank={rank} or more to from_base"
        )
    if adapter.scale == 0:
        raise ValueError("adapter_scale is 0, so that no adapter has an effect; give another to from_base")


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """The factor on `B @ A`, by PEFT's rules: alpha over rank, or over its root (rsLoRA); patterns come first."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
