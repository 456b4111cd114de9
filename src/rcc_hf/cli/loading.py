# SPDX-License-Identifier: Apache-2.0
"""What the commands share: a model on its device, its tokenizer, texts from files, and a summary of a memory."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from rcc_hf.checkpoints import load_model, load_tokenizer
from rcc_hf.cli.settings import CompressorSettings, ModelSettings
from rcc_hf.evaluation.methods_base import entry_nbytes
from rcc_hf.modeling.compressed_rcc import RCCMemory
from rcc_hf.modeling.modeling_rcc import RCCForCausalLM


def load(
    name: str, settings: ModelSettings, fresh: CompressorSettings | None = None
) -> tuple[RCCForCausalLM, PreTrainedTokenizerBase]:
    """Model (on its device) and tokenizer; what `fresh` has None for is not given.

    Raises:
        ValueError: if the scheme has no such option, or the model takes none.
    """
    given = {} if fresh is None else {key: value for key, value in asdict(fresh).items() if value is not None}
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    attention = settings.attn_implementation
    try:
        model = load_model(name, settings.base, settings.dtype, attn_implementation=attention, device=device, **given)
    except TypeError as error:  # the flags are those of all schemes
        raise ValueError(str(error)) from error
    torch.nn.Module.to(model, device)
    return model, load_tokenizer(model, name, settings.base)


def read_text(source: str) -> str:
    """The text of a file, or of standard input for "-"."""
    return sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")


def encode(tokenizer: PreTrainedTokenizerBase, text: str, device: torch.device) -> torch.Tensor:
    """Ids `[1, T]` without special tokens."""
    return tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"].to(device)


def compress_with_progress(model: RCCForCausalLM, input_ids: torch.Tensor, **options: Any) -> RCCMemory:
    """`model.compress` with a progress bar over source tokens."""
    with tqdm(total=input_ids.shape[1], desc="Compressing", unit="token", unit_scale=True) as bar:
        return model.compress(input_ids, on_progress=bar.update, **options)


def plain_kv_bytes(model: RCCForCausalLM, num_tokens: int) -> int:
    """Bytes of an uncompressed KV cache."""
    return num_tokens * entry_nbytes(model)
