# SPDX-License-Identifier: Apache-2.0
"""Training a compressor: the Trainer of transformers on a frozen base. What it logs is explained in `METRICS`."""

from rcc_hf.training.batches import collate_equal
from rcc_hf.training.losses import HeadLoss, Teacher
from rcc_hf.training.metrics import METRICS, explain
from rcc_hf.training.parts import PARTS, choose_parts, parameter_groups, part_of
from rcc_hf.training.quality import Quality, QualitySettings, make_probes, quality_callbacks
from rcc_hf.training.running import train
from rcc_hf.training.settings import TrainSettings
from rcc_hf.training.trainer import RCCTrainer

__all__ = [
    "METRICS",
    "PARTS",
    "HeadLoss",
    "Quality",
    "QualitySettings",
    "RCCTrainer",
    "Teacher",
    "TrainSettings",
    "choose_parts",
    "collate_equal",
    "explain",
    "make_probes",
    "parameter_groups",
    "part_of",
    "quality_callbacks",
    "train",
]
