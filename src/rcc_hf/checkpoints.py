# SPDX-License-Identifier: Apache-2.0
"""Finding models for people: by a name of the bundled one, a base, or an RCC checkpoint."""

from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from rcc_hf.attention import resolve_attention
from rcc_hf.modeling.modeling_rcc import RCCForCausalLM
from rcc_hf.objectives import RECONSTRUCTION_PROMPT
from rcc_hf.smollm import SMOLLM2_NAMES, resolve_base

DTYPES: dict[str, torch.dtype | str] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

NO_LIMIT = 10**30
"""What tokenizers of transformers have as `model_max_length` when there is none."""


def parse_dtype(name: str) -> torch.dtype | str:
    """A dtype by name; "auto" is the checkpoint's.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r} is not known; choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def load_model(
    name: str,
    base: str | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    device: str | None = None,
    **fresh: Any,
) -> RCCForCausalLM:
    """An RCC model: the checkpoint `name`, or a fresh compressor on the base `name`.

    Args:
        name: id on the Hub, folder, or "smollm2" for the bundled base.
        base: where an adapter-only checkpoint finds its base.
        dtype: "auto", "float32", "bfloat16" or "float16".
        attn_implementation: name of an attention, "auto" for the best (see `rcc_hf.attention`); None: the library's.
        device: where the model will be used, by which its attention is chosen; None: the GPU if there is one. The
            model itself is loaded into the CPU's memory.
        fresh: for a base: fields of `RCCConfig` and options of the scheme.

    Raises:
        ImportError: if the attention does not work here.
        ValueError: if `fresh` is given for a checkpoint that has its own values.
    """
    path = resolve_base(name)
    found, _ = PreTrainedConfig.get_config_dict(path)
    loading = loading_options(found, dtype, attn_implementation, device)
    if found.get("model_type") != "rcc":
        return RCCForCausalLM.from_base(path, **loading, **fresh)
    changed = {key: value for key, value in fresh.items() if {**found, **found["scheme_options"]}.get(key) != value}
    if changed:
        raise ValueError(f"{name} is an RCC checkpoint with values of its own; {changed} can be set for a base only")
    if base is None and found.get("adapter_only") and found.get("base_model_name_or_path") in SMOLLM2_NAMES:
        base = found["base_model_name_or_path"]  # the bundled base, which only this package finds
    base_model = None if base is None else resolve_base(base)
    return RCCForCausalLM.from_pretrained(path, base_model=base_model, **loading)


def loading_options(
    found: dict[str, Any], dtype: str, attn_implementation: str | None = None, device: str | None = None
) -> dict[str, Any]:
    """Arguments of `from_pretrained`: a dtype, and an attention if one is asked for.

    Args:
        found: the checkpoint's configuration, as its file has it.
        dtype: by name, as for `parse_dtype`.
        attn_implementation: name of an attention, or "auto" for the best.
        device: where the model will be used.

    Raises:
        ImportError: if the attention does not work there.
        ValueError: if the dtype is not known.
    """
    kind = parse_dtype(dtype)
    stored = found.get("dtype") or found.get("torch_dtype") or "float32"
    will_be = kind if isinstance(kind, torch.dtype) else getattr(torch, str(stored), None)
    attention = resolve_attention(attn_implementation, device, will_be)
    return {"dtype": kind} if attention is None else {"dtype": kind, "attn_implementation": attention}


def load_tokenizer(model: RCCForCausalLM, name: str, base: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of checkpoint `name`, or that of its base (`base` if that has moved) if it has none."""
    return find_tokenizer(name, model.config.base_model_name_or_path if base is None else base)


def find_tokenizer(name: str, base: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that need not be loaded.

    The base's longest input is no limit of ours: saved with the checkpoint, it would have tokenizers and pipelines
    warn of every long text.

    Args:
        name: checkpoint, base or tokenizer: id on the Hub, folder, or "smollm2" for the bundled base.
        base: whose tokenizer it is if `name` has none; None: the base that the checkpoint names.
    """
    path = resolve_base(name)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=True, model_max_length=NO_LIMIT)
    except (OSError, ValueError):
        if base is None:
            base = PreTrainedConfig.get_config_dict(path)[0].get("base_model_name_or_path")
        if base is None:
            raise
        return AutoTokenizer.from_pretrained(resolve_base(base), model_max_length=NO_LIMIT)


def ensure_reconstruction_prompt(model: RCCForCausalLM, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of the prompt that asks for reconstruction, written into the configuration if it has none."""
    if model.config.reconstruction_prompt_ids is None:
        encoded = tokenizer(RECONSTRUCTION_PROMPT, add_special_tokens=False)
        model.config.reconstruction_prompt_ids = list(encoded["input_ids"])
    return model.config.reconstruction_prompt_ids
