# SPDX-License-Identifier: Apache-2.0
"""From the output of a training to a folder that others can use: packed, checked, and with a model card."""

from rcc_hf.shipping.card import model_card
from rcc_hf.shipping.code import renew_code
from rcc_hf.shipping.facts import DataSource, TrainingFacts, read_facts
from rcc_hf.shipping.faults import MOST_BYTES, faults
from rcc_hf.shipping.packing import pack
from rcc_hf.shipping.tables import result_tables

__all__ = [
    "MOST_BYTES",
    "DataSource",
    "TrainingFacts",
    "faults",
    "model_card",
    "pack",
    "read_facts",
    "renew_code",
    "result_tables",
]
