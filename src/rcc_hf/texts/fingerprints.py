# SPDX-License-Identifier: Apache-2.0
"""By what token ids know the tokenizer that made them: its words, and what it does to a probe."""

import hashlib
import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rcc_hf.texts.index import ShardIndex

__all__ = ["check_tokenizer", "tokenizer_fingerprint"]

# Case, accents, composed and decomposed letters, scripts, digits, blanks, code and rare signs: where tokenizers differ.
_PROBE = (
    "The quick brown fox isn't 12345.67 metres away,  it's\there!\n\n  Ünïcödé e\u0301 \u00e9 ﬁ Ǆ ß İ — “quoted” … "
    "中文字符 日本語 한국어 العربية हिन्दी Ελληνικά 🙂👍🏽\u200d\u00a0\ufeff "
    "def f(x):\r\n    return x**2  # <b>&amp;</b> camelCase SNAKE_CASE"
)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hexadecimal digits from the vocabulary and the ids of a probe.

    What tokenizers do alike under every version of their library, and nothing of their files.
    """
    words = sorted(tokenizer.get_vocab().items())
    probe = tokenizer(_PROBE, add_special_tokens=False, verbose=False)["input_ids"]
    return hashlib.sha256(json.dumps([words, list(probe)]).encode()).hexdigest()[:16]


def check_tokenizer(index: ShardIndex, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Refuse ids of another tokenizer.

    Raises:
        ValueError: they are.
    """
    found = tokenizer_fingerprint(tokenizer)
    if found != index.tokenizer_fingerprint:
        raise ValueError(
            f"{folder} was made with the tokenizer {index.tokenizer!r} ({index.tokenizer_fingerprint}), and this one "
            f"is {tokenizer.name_or_path!r} ({found}), whose ids mean something else; tokenize the texts anew"
        )
