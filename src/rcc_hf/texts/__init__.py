# SPDX-License-Identifier: Apache-2.0
"""Texts for training: documents, questions and conversations from files and data sets, and token shards on disk."""

from rcc_hf.texts.shards import TokenShards
from rcc_hf.texts.windows import Windows

__all__ = ["TokenShards", "Windows"]
