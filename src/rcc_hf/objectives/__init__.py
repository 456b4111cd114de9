# SPDX-License-Identifier: Apache-2.0
"""What the compressor is trained for, as examples: a context, local tokens, and labels; and how these are mixed."""

from rcc_hf.objectives.accuracy import token_accuracy
from rcc_hf.objectives.base import IGNORED, Objective, Shape, build_example
from rcc_hf.objectives.cloze import Cloze
from rcc_hf.objectives.collating import collate
from rcc_hf.objectives.continuation import Continuation
from rcc_hf.objectives.conversations import Conversations
from rcc_hf.objectives.haystacks import FillerText, Haystack, ShardText
from rcc_hf.objectives.instructions import Instructions
from rcc_hf.objectives.mixture import Mixture
from rcc_hf.objectives.needles import Needles
from rcc_hf.objectives.phases import Phase, Phases
from rcc_hf.objectives.phrasings import PHRASINGS
from rcc_hf.objectives.questions import QuestionAnswering
from rcc_hf.objectives.reconstruction import (
    RECONSTRUCTION_PROMPT,
    PassageReconstruction,
    Reconstruction,
    reconstruction_example,
)
from rcc_hf.objectives.sequences import LongText

__all__ = [
    "IGNORED", "PHRASINGS", "RECONSTRUCTION_PROMPT", "Cloze", "Continuation", "Conversations", "FillerText",
    "Haystack", "Instructions", "LongText", "Mixture", "Needles", "Objective", "PassageReconstruction", "Phase",
    "Phases", "QuestionAnswering", "Reconstruction", "Shape", "ShardText", "build_example", "collate",
    "reconstruction_example", "token_accuracy",
]  # fmt: skip
