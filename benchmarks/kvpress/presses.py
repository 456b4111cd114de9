# SPDX-License-Identifier: Apache-2.0
"""kvpress's presses, set so that they keep a given number of entries of a context."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator

from kvpress import BasePress, ExpectedAttentionPress, KVzipPress, SnapKVPress
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["PRESSES", "count_entries", "make_press", "without_template"]

_SNAPKV_WINDOW = 64


def _snapkv(length: int, kept: int) -> BasePress:
    """The tokens of the window, which are all kept, may not be more than the budget: half of it at most."""
    window = min(_SNAPKV_WINDOW, max(1, kept // 2))
    return SnapKVPress(compression_ratio=_share_removed(length, kept), window_size=window)


def _expected_attention(length: int, kept: int) -> BasePress:
    return ExpectedAttentionPress(compression_ratio=_share_removed(length, kept))


def _kvzip(length: int, kept: int) -> BasePress:
    """Its budget is one for all heads of all layers; it rounds the number of removed entries down, not of kept ones."""
    return KVzipPress(compression_ratio=(length - kept + 1e-6) / length)


PRESSES: dict[str, Callable[[int, int], BasePress]] = {
    "snapkv": _snapkv,
    "expected-attention": _expected_attention,
    "kvzip": _kvzip,
}
"""By name; each is made from the length of the context and the number of entries to keep."""


def _share_removed(length: int, kept: int) -> float:
    """What kvpress calls compression ratio; half an entry lower, since it rounds the number of kept ones down."""
    return 1 - (kept + 0.5) / length


def make_press(name: str, length: int, kept: int) -> BasePress | None:
    """A press for one context of `length` tokens; None if all of them may stay, or `name` is "full"."""
    if name == "full" or kept >= length:
        return None
    return PRESSES[name](length, kept)


def count_entries(model: PreTrainedModel, cache: Cache, length: int) -> float:
    """Entries per layer and head that a press has left; a mean where it leaves different numbers.

    KVzip hides entries of single heads instead of removing them, and takes down in each layer which.
    """
    config, hidden = model.config, 0
    for layer in model.model.layers:
        indices = getattr(layer.self_attn, "masked_key_indices", None)
        hidden += 0 if indices is None else len(indices[0])
    if hidden:
        return length - hidden / (config.num_hidden_layers * config.num_key_value_heads)
    return cache.get_seq_length()


@contextlib.contextmanager
def without_template(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Let KVzip, which loads the tokenizer itself, find no chat template: our contexts stand outside of one.

    It would otherwise take the first tokens of a context for the beginning of the template, and remove them unscored.
    """
    name, template = model.config.name_or_path, tokenizer.chat_template
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.chat_template = None
        tokenizer.save_pretrained(folder)
        tokenizer.chat_template = template
        model.config.name_or_path = folder
        try:
            yield
        finally:
            model.config.name_or_path = name
