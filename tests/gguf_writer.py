# SPDX-License-Identifier: Apache-2.0
"""Writes small GGUF files for the tests, byte by byte as the format says and independently of the reader."""

import struct
from pathlib import Path

import numpy as np

F32, Q4_1, Q8_0 = 0, 3, 8


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
    return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)


def gguf_bytes(metadata: dict, tensors: dict, *, version: int = 3) -> bytes:
    """Return a GGUF file.

    Args:
        metadata: Values bool, int (written as uint32), float (float32), str, list of str or of int (int32).
        tensors: `name -> (kind, shape with rows first, data)`; or a float32 array.
        version: The version number in the header.
    """
    alignment = metadata.get("general.alignment", 32)
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    header += b"".join(_string(key) + _value(value) for key, value in metadata.items())
    data = b""
    for name, tensor in tensors.items():
        if isinstance(tensor, np.ndarray):
            tensor = (F32, tensor.shape, tensor.astype("<f4").tobytes())
        kind, shape, content = tensor
        data += bytes(-len(data) % alignment)
        header += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        header += struct.pack("<IQ", kind, len(data))
        data += content
    return header + bytes(-len(header) % alignment) + data


def _byte_tokens() -> list[str]:
    """Return GPT-2's 256 printable stand-ins for bytes, the tokens that a byte-level vocabulary starts from."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]


def tiny_llama_metadata() -> dict:
    """Return metadata of a one-layer Llama: width 8, 2 heads of 4 with 1 key/value head, 261 tokens."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *_byte_tokens(), "he", "12"]
    return {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": 8,
        "llama.feed_forward_length": 16,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 100000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": ["h e", "1 2"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}",
    }


def tiny_llama_tensors() -> dict:
    """Return tensors for `tiny_llama_metadata`; every value is a small integer, exact in bfloat16."""
    shapes = {
        "token_embd": (261, 8),
        "output_norm": (8,),
        "blk.0.attn_norm": (8,),
        "blk.0.attn_q": (8, 8),
        "blk.0.attn_k": (4, 8),
        "blk.0.attn_v": (4, 8),
        "blk.0.attn_output": (8, 8),
        "blk.0.ffn_norm": (8,),
        "blk.0.ffn_gate": (16, 8),
        "blk.0.ffn_up": (16, 8),
        "blk.0.ffn_down": (8, 16),
    }
    return {f"{name}.weight": np.arange(np.prod(shape)).reshape(shape) % 64 for name, shape in shapes.items()}


def write_tiny_llama(path: Path, *, metadata: dict | None = None, tensors: dict | None = None) -> Path:
    """Write the tiny Llama with some metadata or tensors replaced or added; return the path."""
    content = gguf_bytes(tiny_llama_metadata() | (metadata or {}), tiny_llama_tensors() | (tensors or {}))
    path.write_bytes(content)
    return path
