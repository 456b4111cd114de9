# SPDX-License-Identifier: Apache-2.0
"""Models of published shapes with random weights, made on the device: the plain base and ours, over the same weights.

Nothing is downloaded and nothing is trained: how long a step takes does not depend on what the weights are. Adapters
are random too, since products with zeros draw less power and may run faster.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from rcc_hf import RCCConfig, RCCForCausalLM
from rcc_hf.attention import resolve_attention
from rcc_hf.modeling.fingerprint_rcc import is_trained_part

_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        **_8B,
        "model_type": "llama",
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    # version 0.2, without the sliding window of 0.1
    "mistral-7b": {
        **_8B,
        "model_type": "mistral",
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "smollm2": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    "tiny": {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
}
"""As the published configurations have them; "tiny" is no one's, for a CPU."""


@dataclass(frozen=True)
class Pair:
    """Both sides of a comparison: transformers' own model, and ours, which holds the very same weights."""

    base: PreTrainedModel
    rcc: RCCForCausalLM

    @property
    def device(self) -> torch.device:
        return self.rcc.device

    @property
    def vocab_size(self) -> int:
        return self.base.config.vocab_size

    def weight_bytes(self) -> dict[str, int]:
        """Of either side alone; in one process there are those of ours, which hold the base's."""
        return {side: sum(p.nbytes for p in model.parameters()) for side, model in self.sides().items()}

    def sides(self) -> dict[str, PreTrainedModel]:
        return {"base": self.base, "rcc": self.rcc}

    def random_ids(self, rows: int, length: int) -> Tensor:
        """Tokens `[rows, length]`."""
        return torch.randint(3, self.vocab_size, (rows, length), device=self.device)


def text_config(shape: str) -> PreTrainedConfig:
    """The configuration of a base.

    Raises:
        ValueError: the shape is unknown.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape={shape!r} is not known; choose one of {', '.join(SHAPES)}")
    fields = dict(SHAPES[shape])
    return AutoConfig.for_model(fields.pop("model_type"), **copy.deepcopy(fields))


def count_parameters(shape: str) -> int:
    """Of the base, tied ones once; nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(text_config(shape)).parameters())


def kv_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """What an uncompressed token takes in a KV cache."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * width * dtype.itemsize


def build(shape: str, attention: str, device: str | torch.device, dtype: torch.dtype, **fields: Any) -> Pair:
    """Both models, in evaluation mode.

    Args:
        shape: Of `SHAPES`.
        attention: Name of an attention.
        device: Where they are made; no other memory is used.
        dtype: Of all weights.
        fields: Of `RCCConfig`.

    Raises:
        ImportError: the attention does not work there.
        ValueError: the shape is unknown.
    """
    resolve_attention(attention, device, dtype)
    torch.manual_seed(0)
    config = RCCConfig(text_config=text_config(shape), fit_positions=True, **fields)
    with torch.device(device):
        model = RCCForCausalLM._from_config(config, dtype=dtype, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_trained_part(name):
                parameter.normal_(std=0.02)
    model.requires_grad_(False)
    return Pair(_share_base(model, attention, dtype), model)


def _share_base(model: RCCForCausalLM, attention: str, dtype: torch.dtype) -> PreTrainedModel:
    """The base as transformers makes it, without memory of its own."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(
            copy.deepcopy(model.config.text_config), dtype=dtype, attn_implementation=attention
        ).eval()
    inner = "model.language_model."
    weights = {name.replace(inner, "model."): tensor for name, tensor in model.state_dict().items()}
    base.load_state_dict({n: t for n, t in weights.items() if not is_trained_part(n)}, assign=True)
    for name, buffer in model.model.language_model.named_buffers():  # tables of positions, which no state dict holds
        owner, _, last = name.rpartition(".")
        base.model.get_submodule(owner).register_buffer(last, buffer, persistent=False)
    return base.requires_grad_(False)
