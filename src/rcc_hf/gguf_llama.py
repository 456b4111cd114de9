# SPDX-License-Identifier: Apache-2.0
"""Writes a Llama model with its tokenizer, read from a GGUF file, as a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from rcc_hf.gguf import GGUFFile

__all__ = ["HF_FILES", "write_llama_folder"]

HF_FILES = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")

_TOP_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# GGUF names a tokenizer's splitting rule; the rule itself is not in the file.
_DIGITS_THEN_BYTES = "smollm"
_CONTROL_TOKEN = 3


def write_llama_folder(source: GGUFFile, folder: Path, *, progress: bool = True) -> None:
    """Write bfloat16 weights, configuration and tokenizer of a GGUF Llama into an existing folder.

    Args:
        source: An open GGUF file.
        folder: Receives the files named in `HF_FILES`.
        progress: Show a progress bar over the tensors.

    Raises:
        ValueError: The file holds another architecture or tokenizer, or lacks a metadata key.
    """
    # The small files come first: a file that cannot be converted is refused before the slow part.
    contents = {
        "config.json": _config(source),
        "generation_config.json": _token_ids(source),
        "tokenizer.json": _tokenizer(source),
        "tokenizer_config.json": _tokenizer_config(source),
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    tensors = _hf_tensors(source, progress=progress)
    weights = {name: torch.from_numpy(weight).to(torch.bfloat16) for name, weight in tensors}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # safetensors makes its file private to the user; a shared cache needs the permissions of the others.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def _hf_tensors(source: GGUFFile, *, progress: bool) -> Iterator[tuple[str, np.ndarray]]:
    num_heads = {"attn_q": _get(source, "llama.attention.head_count"), "attn_k": _num_kv_heads(source)}
    for name in tqdm(source.tensors, desc=f"Converting {source.path.name}", unit="tensor", disable=not progress):
        weight = source.load(name)
        if name in _TOP_TENSORS:
            yield _TOP_TENSORS[name], weight
            continue
        prefix, _, rest = name.partition(".")
        layer, _, part = rest.removesuffix(".weight").partition(".")
        if prefix != "blk" or part not in _LAYER_TENSORS:
            raise ValueError(f"{source.path} has the tensor {name!r}, which no Llama of transformers has a place for.")
        if part in num_heads:
            weight = _halves_from_pairs(weight, num_heads[part])
        yield f"model.layers.{layer}.{_LAYER_TENSORS[part]}.weight", weight


def _halves_from_pairs(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder the rows of a query or key projection, `[H * head_dim, D]`.

    GGUF rotates neighbouring rows 2i and 2i + 1 of a head together, transformers rows i and i + head_dim / 2.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def _config(source: GGUFFile) -> dict[str, Any]:
    architecture = _get(source, "general.architecture")
    if architecture != "llama":
        raise ValueError(f"{source.path} holds the architecture {architecture!r}; only 'llama' can be converted.")
    width, num_heads = _get(source, "llama.embedding_length"), _get(source, "llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(_get(source, "tokenizer.ggml.tokens")),
        "hidden_size": width,
        "intermediate_size": _get(source, "llama.feed_forward_length"),
        "num_hidden_layers": _get(source, "llama.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": _num_kv_heads(source),
        "head_dim": width // num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": _get(source, "llama.context_length"),
        # Stored as float32: 9.999999747378752e-06 is 1e-05.
        "rms_norm_eps": float(str(np.float32(_get(source, "llama.attention.layer_norm_rms_epsilon")))),
        "rope_parameters": {"rope_type": "default", "rope_theta": _get(source, "llama.rope.freq_base")},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in source.tensors,
        "dtype": "bfloat16",
        **_token_ids(source),
    }


def _token_ids(source: GGUFFile) -> dict[str, int]:
    return {
        "bos_token_id": _get(source, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _get(source, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _get(source, "tokenizer.ggml.padding_token_id"),
    }


def _tokenizer(source: GGUFFile) -> dict[str, Any]:
    rule = (_get(source, "tokenizer.ggml.model"), _get(source, "tokenizer.ggml.pre"))
    if rule != ("gpt2", _DIGITS_THEN_BYTES):
        raise ValueError(f"{source.path} has the tokenizer {rule}; only ('gpt2', {_DIGITS_THEN_BYTES!r}) is known.")
    tokens = _get(source, "tokenizer.ggml.tokens")
    kinds = _get(source, "tokenizer.ggml.token_type")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": token, **flags}
            for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind == _CONTROL_TOKEN
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in _get(source, "tokenizer.ggml.merges")],
        },
    }


def _tokenizer_config(source: GGUFFile) -> dict[str, Any]:
    tokens = _get(source, "tokenizer.ggml.tokens")
    ids = _token_ids(source)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[ids["bos_token_id"]],
        "eos_token": tokens[ids["eos_token_id"]],
        "pad_token": tokens[ids["pad_token_id"]],
        "unk_token": tokens[_get(source, "tokenizer.ggml.unknown_token_id")],
        "clean_up_tokenization_spaces": False,
        "model_max_length": _get(source, "llama.context_length"),
        "chat_template": _get(source, "tokenizer.chat_template"),
    }


def _num_kv_heads(source: GGUFFile) -> int:
    return int(_get(source, "llama.attention.head_count_kv"))


def _get(source: GGUFFile, key: str) -> Any:
    if key not in source.metadata:
        raise ValueError(f"{source.path} lacks the metadata key {key!r}, so it cannot be converted.")
    return source.metadata[key]
