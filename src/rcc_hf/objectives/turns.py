# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a conversation the assistant wrote, by the tokenizer's chat template, whatever that template is."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rcc_hf.conversations import REPLY, USER

__all__ = ["closing_id", "encode_conversation"]

Message = Mapping[str, Any]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a conversation, and which of them are of replies.

    A reply is what the assistant wrote and the end token behind it. Templates that mark replies (`{% generation %}`)
    are asked; of others replies are found by rendering the same conversation with stand-ins in their places.

    Args:
        tokenizer: A fast one, with a chat template.
        messages: With `role` and `content`.

    Returns:
        Ids `[T]`, and whether each is part of a reply `[T]`.

    Raises:
        ValueError: the template refuses the messages, or changes what the assistant wrote.
    """
    if _GENERATION.search(str(tokenizer.chat_template)):
        asked: Any = list(messages)
        encoded: Any = tokenizer.apply_chat_template(
            asked, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, is_reply = np.asarray(encoded["input_ids"]), np.asarray(encoded["assistant_masks"], dtype=bool)
    else:
        text, spans = _find_replies(tokenizer, messages)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = np.asarray(encoded["input_ids"]), np.asarray(encoded["offset_mapping"]).reshape(-1, 2)
        is_reply = _mark(tokenizer, ids, offsets, spans)
    return ids.astype(np.int64), is_reply


def closing_id(tokenizer: PreTrainedTokenizerBase, default: int) -> int:
    """The special token by which the chat template ends a reply, or the default if it has none."""
    rendered = _render(tokenizer, [_user(1), _reply(1)])
    closing = rendered[rendered.index(REPLY.format(1)) + len(REPLY.format(1)) :]
    special = set(tokenizer.all_special_ids)
    ids = tokenizer(closing, add_special_tokens=False, verbose=False)["input_ids"]
    return next((token for token in ids if token in special), default)


def _find_replies(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and the first and last letter (exclusive) of each reply."""
    replies = [message["content"] for message in messages if message["role"] == "assistant"]
    numbers = iter(range(1, len(replies) + 1))
    stand_ins = [_reply(next(numbers)) if message["role"] == "assistant" else message for message in messages]
    text, frame = _render(tokenizer, messages), _render(tokenizer, stand_ins)
    for contents in (replies, [reply.strip() for reply in replies]):
        rebuilt, spans, rest = "", [], frame
        for number, content in enumerate(contents, 1):
            before, _, rest = rest.partition(REPLY.format(number))
            spans.append((len(rebuilt) + len(before), len(rebuilt) + len(before) + len(content)))
            rebuilt += before + content
        if rebuilt + rest == text:
            return text, spans
    raise ValueError(
        "the chat template changes what the assistant wrote, so its tokens cannot be told from others; use a template "
        "that marks them with {% generation %}, or one that renders replies as they are"
    )


def _mark(
    tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, offsets: np.ndarray, spans: Sequence[tuple[int, int]]
) -> np.ndarray:
    """Whether each token lies in a span `[T]`, or is the special token that ends it."""
    special = np.isin(ids, tokenizer.all_special_ids)
    begins, ends = offsets[:, 0], offsets[:, 1]
    marked = np.zeros(len(ids), dtype=bool)
    for first, last in spans:
        # a token may begin with the blank in front of a reply
        marked |= (ends > first) & (begins < last) & (ends <= last) & ~special
        behind = int(np.searchsorted(begins, last))
        if behind < len(ids) and special[behind]:
            marked[behind] = True
    return marked


def _user(number: int) -> Message:
    return {"role": "user", "content": USER.format(number)}


def _reply(number: int) -> Message:
    return {"role": "assistant", "content": REPLY.format(number)}


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    asked: Any = list(messages)
    try:
        return str(tokenizer.apply_chat_template(asked, tokenize=False))
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"the chat template refuses messages of {roles}: {error}") from error
