# SPDX-License-Identifier: Apache-2.0
"""Reconstruction: texts, or passages of documents, that are compressed whole and have to be written down again."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rcc_hf.evaluation.encoding import encode_context, encode_text, prefix_ids
from rcc_hf.evaluation.examples import Example
from rcc_hf.texts.documents import read_documents

__all__ = ["ReconstructionEncoder", "Tail", "choose_places", "passages", "read_texts", "reconstruction_example"]

Tail = Literal["cut", "raw", "pad"]
"""What becomes of tokens behind the last whole segment of a text."""

_SURPLUS = 32


def read_texts(source: str) -> Iterator[tuple[str, str]]:
    """Texts with their place for messages, of whatever `read_documents` reads.

    Raises:
        ValueError: a line has no text, or there is nothing to read.
    """
    return ((document.place, document.text) for document in read_documents(source))


@dataclass(frozen=True)
class ReconstructionEncoder:
    """The ids of a text that are compressed, and those of the prompt that asks for them.

    Attributes:
        tokenizer: Of the model.
        prompt_ids: Behind the context.
    """

    tokenizer: PreTrainedTokenizerBase
    prompt_ids: Sequence[int]

    def __call__(self, example: Example) -> tuple[Tensor, Tensor]:
        """Ids of context and prompt; with the tail `pad` it is the method that fills the last segment up."""
        ids = encode_context(self.tokenizer, example.context)[: example.metadata["length"]]
        return ids, torch.tensor(list(self.prompt_ids), dtype=torch.long)


def reconstruction_example(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    segment_length: int,
    prompt: str,
    *,
    tail: Tail = "cut",
    length: int | None = None,
    max_new_tokens: int | None = None,
    place: str = "",
) -> Example:
    """A text that is to be written down again.

    Args:
        text: The text.
        tokenizer: Of the model.
        segment_length: Tokens that are compressed together.
        prompt: Asks for it.
        tail: `cut`: only whole segments are read and scored; `raw`: all is, and what is behind the last whole segment
            stays raw; `pad`: all is, with a last segment that is filled up.
        length: Read only so many tokens of the text.
        max_new_tokens: Write, and score, only the first so many.
        place: Where the text was found, for messages.

    Raises:
        ValueError: the text has less than a segment, and is not padded.
    """
    ids, begin = encode_context(tokenizer, text), len(prefix_ids(tokenizer))
    total = len(ids) - begin
    ids = ids[:length]
    whole = len(ids) - len(ids) % segment_length
    if len(ids) == begin or (not whole and tail != "pad"):
        raise ValueError(
            f"{place}{place and ': '}the text has {len(ids)} tokens, less than a segment of {segment_length}; leave it "
            "out, give a longer one, or have the segment filled up (tail: pad)"
        )
    read = whole if tail == "cut" else len(ids)
    scored = ids[begin : min(read, begin + (max_new_tokens or read))]
    return Example(
        context=text,
        question=prompt,
        answer=str(tokenizer.decode(scored.tolist(), skip_special_tokens=True)),
        max_new_tokens=len(scored),
        task="reconstruction",
        metric="reconstruction",
        metadata={
            "length": read,
            "context_tokens": read,
            "text_tokens": total if length is None else len(ids) - begin,
            "scored_tokens": len(scored),
            "tail": tail,
        },
    )


def choose_places(sizes: Sequence[int], length: int, count: int, seed: int) -> list[tuple[int, int]]:
    """Document and first token of passages that do not overlap (where there are enough), in order.

    Args:
        sizes: Tokens of each document.
        length: Tokens of a passage.
        count: How many; less where the documents have no more.
        seed: Other ones for another seed.

    Raises:
        ValueError: no document has so many tokens.
    """
    starts = [(document, start) for document, size in enumerate(sizes) for start in range(0, size - length + 1, length)]
    if not starts:
        raise ValueError(
            f"no document has {length} tokens, the longest has {max(sizes, default=0)}; give shorter lengths, or "
            "longer documents as data"
        )
    return sorted(random.Random(f"{seed}|{length}").sample(starts, min(count, len(starts))))


def passages(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int) -> list[str]:
    """Passages of at least `length` tokens from documents, evenly likely.

    A passage is a little longer than asked for, since its beginning alone may be tokenized otherwise.

    Raises:
        ValueError: no document is that long.
    """
    documents = [encode_text(tokenizer, text) for text in texts]
    places = choose_places(list(map(len, documents)), length + _SURPLUS, count, seed)
    return [
        str(tokenizer.decode(documents[index][start : start + length + _SURPLUS].tolist())) for index, start in places
    ]
