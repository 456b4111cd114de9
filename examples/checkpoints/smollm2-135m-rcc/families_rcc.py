# SPDX-License-Identifier: Apache-2.0
"""The base architectures we know, and the few places where they differ for us."""

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Family:
    """How the checkpoint of one architecture names its parts.

    `backbone` and `head` are the prefixes of the weights; `softcap` and `divisor` name the fields of its
    configuration that scale the logits.
    """

    backbone: str = "model"
    head: str = "lm_head"
    softcap: str | None = None
    divisor: str | None = None


_LLAMA_LIKE = ("llama", "mistral", "mixtral", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_moe")

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(_LLAMA_LIKE, Family()),
    "gemma2": Family(softcap="final_logit_softcapping"),
    "gemma3_text": Family(softcap="final_logit_softcapping"),
    "gpt_neox": Family(backbone="gpt_neox", head="embed_out"),
    "granite": Family(divisor="logits_scaling"),
}


def family_of(text_config) -> Family:
    """The entry of `FAMILIES` for a base configuration.

    Raises:
        ValueError: if the architecture is not in the table; we would not know how its logits are scaled.
    """
    try:
        return FAMILIES[text_config.model_type]
    except KeyError:
        raise ValueError(
            f"RCC does not know base models of type {text_config.model_type!r}. Known types: "
            f"{', '.join(sorted(FAMILIES))}. Choose a base of one of these, or add the type to FAMILIES "
            "(the test that compares un-compressed logits with the base's must pass for it)."
        ) from None


def scale_logits(logits: Tensor, text_config) -> Tensor:
    """What the base model does to `lm_head`'s output `[..., V]`: division (Granite) or soft capping (Gemma)."""
    family = family_of(text_config)
    if family.divisor:
        logits = logits / getattr(text_config, family.divisor)
    cap = getattr(text_config, family.softcap) if family.softcap else None
    return logits if cap is None else torch.tanh(logits / cap) * cap


def adaptable_linears(layer: nn.Module) -> dict[str, nn.Linear]:
    """The linear maps of a decoder layer that adapters may sit on, by dotted name: attention and dense MLP, never a
    router or single experts (they see only some of the rows)."""
    skipped = {"experts", "router", "gate", "shared_expert_gate", "shared_expert", "rcc"}
    return {
        name: module
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and not skipped & set(name.split("."))
    }


def choose_linears(linears: dict[str, nn.Linear], targets: Sequence[str] | None) -> dict[str, nn.Linear]:
    """Those of `linears`, by dotted name, whose last name is in `targets`; all for None.

    Raises:
        ValueError: if a target names none of them.
    """
    if targets is None:
        return linears
    known = {name.rpartition(".")[2] for name in linears}
    unknown = set(targets) - known
    if unknown:
        raise ValueError(f"targets {sorted(unknown)} name no linear map of this base; it has {sorted(known)}")
    return {name: linear for name, linear in linears.items() if name.rpartition(".")[2] in targets}


def layer_windows(text_config) -> dict[str, int | None] | int | None:
    """How many tokens, itself included, a token sees back: one number for all layers, or by kind of layer where a base
    takes a mask for each kind; None for all tokens."""
    window, kinds = getattr(text_config, "sliding_window", None), getattr(text_config, "layer_types", None)
    if kinds is None:
        return window
    return {kind: window if kind == "sliding_attention" else None for kind in {"full_attention", *kinds}}


def cache_argument(layer: nn.Module) -> str:
    """The name under which a decoder layer takes the cache."""
    names = inspect.signature(type(layer).forward).parameters
    return "layer_past" if "layer_past" in names else "past_key_values"


def rotary_tables(decoder: PreTrainedModel, index: int, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine `[B, T, R]` by which layer `index` of the base rotates keys at `position_ids` `[B, T]`.

    Positions may be fractions. Gemma 3 has one table per kind of layer; the others have one for all.
    """
    rotary = decoder.rotary_emb
    like = torch.empty(0, device=position_ids.device, dtype=decoder.dtype)
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        return rotary(like, position_ids, decoder.config.layer_types[index])
    return rotary(like, position_ids)


def rotate_keys(decoder: PreTrainedModel, index: int, keys: Tensor, position_ids: Tensor) -> Tensor:
    """Keys `[B, H, T, D]` that were projected at position 0, moved to `position_ids` `[B, T]` as the base would.

    Scaled rotary embeddings (YaRN and kin) multiply the tables by a constant, which a key projected at position 0
    carries already; dividing by the table at 0 keeps it from being applied twice.
    """
    cos, sin = rotary_tables(decoder, index, position_ids)
    constant = rotary_tables(decoder, index, torch.zeros_like(position_ids[:1, :1]))[0].to(cos.dtype)
    apply = sys.modules[type(decoder).__module__].apply_rotary_pos_emb
    return apply(keys, keys, cos / constant, sin / constant)[1]
