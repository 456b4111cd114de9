# SPDX-License-Identifier: Apache-2.0
"""Texts for training: documents, questions and conversations from files and data sets, and token shards on disk.

`rcc_hf.texts.blocks` is not imported here: it makes examples, and what makes examples reads texts.
"""

from rcc_hf.texts.documents import BUNDLED, Document, listed_files, read_documents
from rcc_hf.texts.questions import ChatRow, QARow, read_chat_rows, read_qa_rows
from rcc_hf.texts.shards import TokenShards
from rcc_hf.texts.tokenizing import build_shards, tokenize_documents
from rcc_hf.texts.windows import Windows

__all__ = [
    "BUNDLED",
    "ChatRow",
    "Document",
    "QARow",
    "TokenShards",
    "Windows",
    "build_shards",
    "listed_files",
    "read_chat_rows",
    "read_documents",
    "read_qa_rows",
    "tokenize_documents",
]
