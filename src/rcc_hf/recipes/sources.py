# SPDX-License-Identifier: Apache-2.0
"""Texts, questions and conversations of a recipe, read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from rcc_hf.evaluation.encoding import encode_text
from rcc_hf.texts import ChatRow, QARow, TokenShards, read_chat_rows, read_documents, read_qa_rows
from rcc_hf.texts.index import ShardIndex

__all__ = ["Sources", "read_shards", "read_sources"]


@dataclass(frozen=True)
class Sources:
    """What objectives make examples of; None or nothing where a recipe names none.

    Attributes:
        texts: Documents.
        questions: With contexts and answers.
        chats: Conversations.
    """

    texts: TokenShards | None = None
    questions: Sequence[QARow] = ()
    chats: Sequence[ChatRow] = ()


def read_sources(
    tokenizer: PreTrainedTokenizerBase, *, texts: Sequence[str] = (), questions: Sequence[str] = (),
    chats: Sequence[str] = (), progress: bool = True,
) -> Sources:  # fmt: skip
    """All that a recipe names.

    Raises:
        ValueError: a source is not there, empty, or of another kind; or token shards are of another tokenizer.
    """
    return Sources(
        read_shards(tokenizer, texts, progress=progress) if texts else None,
        [row for source in questions for row in read_qa_rows(source)],
        [row for source in chats for row in read_chat_rows(source)],
    )


def read_shards(tokenizer: PreTrainedTokenizerBase, sources: Sequence[str], *, progress: bool = True) -> TokenShards:
    """One folder of `rcc tokenize`, or documents that are tokenized now and kept in memory.

    Raises:
        ValueError: a source is not there or empty, there are several folders of shards, or they are of another
            tokenizer.
    """
    folders = [source for source in sources if Path(source).is_dir() and ShardIndex.read(Path(source)) is not None]
    if folders:
        if len(sources) > 1:
            raise ValueError(
                f"texts are {', '.join(sources)}, of which {folders[0]} holds token shards; give one folder of "
                "shards alone (rcc tokenize takes several sources), or none"
            )
        return TokenShards.open(Path(folders[0]), tokenizer)
    documents = tqdm(read_documents(*sources), desc="Tokenizing", unit="document", disable=not progress)
    return TokenShards.of_documents(np.asarray(encode_text(tokenizer, one.text)) for one in documents)
