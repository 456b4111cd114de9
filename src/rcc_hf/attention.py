# SPDX-License-Identifier: Apache-2.0
"""Which attention a model runs with: what works here, the best of that, and what to install for one that does not.

Every name is one of transformers' `attn_implementation`, and so are the checks behind it. They look at installed
packages and at the GPU, and download nothing.
"""

import torch
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

__all__ = ["ATTENTIONS", "available_attentions", "best_attention", "resolve_attention", "why_unavailable"]

_INSTALL = {
    "flash_attention_4": "pip install flash-attn-4 (Hopper GPUs and newer)",
    "flash_attention_3": "install flash-attn-3 from the folder hopper/ of github.com/Dao-AILab/flash-attention",
    "flash_attention_2": "pip install flash-attn --no-build-isolation",
}
_CAPABILITY = {"flash_attention_4": 9, "flash_attention_3": 8, "flash_attention_2": 8}
"""Major compute capability that each needs at least; transformers keeps those of 3 and 4 private."""

ATTENTIONS = (*_INSTALL, "sdpa", "eager")
"""Names that we know, the fastest first."""
AUTO = "auto"
HALVES = (torch.float16, torch.bfloat16)


def why_unavailable(name: str, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> str:
    """What keeps a model from running with an attention here, and what to do about it; empty if nothing does.

    Args:
        name: One of `ATTENTIONS`.
        device: Where the model is; None: the GPU if there is one.
        dtype: Of the model; None if it is not known, which is then not looked at.
    """
    if name not in _INSTALL:
        return ""
    cuda = torch.cuda.is_available()
    place = torch.device(device) if device is not None else torch.device("cuda" if cuda else "cpu")
    if place.type != "cuda" or not cuda:
        return f"{name} runs on a CUDA GPU, and this model is on {place.type}. Use sdpa there"
    if dtype is not None and dtype not in HALVES:
        return f"{name} computes in float16 and bfloat16, and this model is in {dtype}. Choose one of both, or sdpa"
    major, minor = torch.cuda.get_device_capability(place)
    if major < _CAPABILITY[name]:
        return f"{name} needs compute capability {_CAPABILITY[name]}.0, and this GPU has {major}.{minor}. Use sdpa"
    return "" if _is_installed(name) else f"{name} is not installed: {_INSTALL[name]}, or use sdpa"


def _is_installed(name: str) -> bool:
    """Whether transformers finds its package. Looked up by name when called, so that nothing is decided at import."""
    checks = {
        "flash_attention_4": is_flash_attn_4_available,
        "flash_attention_3": is_flash_attn_3_available,
        "flash_attention_2": is_flash_attn_2_available,
    }
    return bool(checks[name]())


def available_attentions(device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> list[str]:
    """Those of `ATTENTIONS` that work here, the fastest first; arguments are those of `why_unavailable`."""
    return [name for name in ATTENTIONS if not why_unavailable(name, device, dtype)]


def best_attention(device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> str:
    """The fastest attention that works here: the newest flash attention, otherwise sdpa.

    Decoding with `cache_implementation="static"` behind a memory needs "sdpa", whatever is best elsewhere.
    """
    return available_attentions(device, dtype)[0]


def resolve_attention(
    name: str | None, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> str | None:
    """The name to load a model with.

    Args:
        name: One of `ATTENTIONS`, "auto" for the best, or anything else that transformers knows, which it checks
            itself; None for its own choice.
        device: Where the model will be; None: the GPU if there is one.
        dtype: Of the model; None if it is not known.

    Raises:
        ImportError: it does not work here; the message has what would.
    """
    if name == AUTO:
        return best_attention(device, dtype)
    if name is not None and (reason := why_unavailable(name, device, dtype)):
        works = ", ".join(available_attentions(device, dtype))
        raise ImportError(f"attn_implementation={name!r}: {reason}. What works here: {works}; 'auto' takes the first")
    return name
