# SPDX-License-Identifier: Apache-2.0
"""Text that is compressed and written down again: from its beginning, or from a piece of it that is shown."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from rcc_hf.objectives.base import Ids, Shape, build_example
from rcc_hf.objectives.checks import check_positive, check_share
from rcc_hf.objectives.haystacks import ShardWindows
from rcc_hf.texts import TokenShards

__all__ = [
    "RECONSTRUCTION_PROMPT",
    "PassageReconstruction",
    "Reconstruction",
    "cut_at_times",
    "pad_segment",
    "reconstruction_example",
]

RECONSTRUCTION_PROMPT = "\n\nRepeat the text above:\n"


def reconstruction_example(
    context_ids: Ids,
    prompt_ids: Ids,
    *,
    end_id: int | None = None,
    max_target: int | None = None,
    fill: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """Full auto-encoding: behind the compressed context and a prompt, every token of the context is predicted.

    Args:
        context_ids: `[N]`, whole segments, or with `fill` any text.
        prompt_ids: the prompt `[P]` that asks for it (`RCCConfig.reconstruction_prompt_ids`).
        end_id: follows the last token of the context, so that `generate` stops there.
        max_target: predict only the first so many tokens of a longer context, and no end.
        fill: segment length, and the id that fills up the last segment.

    Returns:
        `context_ids` `[N]`, `input_ids` and `labels` `[P + N]`, one more with `end_id`.
    """
    end = [] if end_id is None else [end_id]
    if max_target is not None and len(context_ids) > max_target:
        target, end = context_ids[:max_target], []
    else:
        target = context_ids
    context = context_ids if fill is None else pad_segment(np.asarray(context_ids), *fill)
    return build_example(context, [(prompt_ids, False), (target, True), (end, True)])


def pad_segment(ids: np.ndarray, segment_length: int, fill_id: int) -> np.ndarray:
    """Ids `[N]` whose last segment is filled up, as evaluation does with the tail "pad"."""
    return np.concatenate([ids, np.full(-len(ids) % segment_length, fill_id, dtype=np.int64)])


def cut_at_times(rng: np.random.Generator, ids: np.ndarray, segment_length: int, share: float) -> np.ndarray:
    """Ids `[N]`, a share of which lose their end, so that their last segment is only partly text."""
    if rng.random() < share and segment_length > 1:
        return ids[: -int(rng.integers(1, segment_length))]
    return ids


class Reconstruction:
    """The whole context is written down, or the beginning of a long one.

    Args:
        shards: Documents.
        prompt_ids: Asks for it (`RCCConfig.reconstruction_prompt_ids`).
        end_id: Ends a text; the tokenizer's `eos_token_id`.
        pad_share: Share of examples whose last segment is only partly text.
        fill_id: Fills it up; `end_id` by default, as in evaluation.
        max_target: Predict only the first so many tokens.
        name: For tables.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        prompt_ids: Sequence[int],
        end_id: int,
        pad_share: float = 0.0,
        fill_id: int | None = None,
        max_target: int | None = None,
        name: str = "reconstruction",
    ):
        check_share("pad_share", pad_share)
        if max_target is not None:
            check_positive("max_target", max_target)
        self.name = name
        self._windows = ShardWindows(shards)
        self._prompt_ids, self._end_id, self._max_target = list(prompt_ids), end_id, max_target
        self._pad_share, self._fill_id = pad_share, end_id if fill_id is None else fill_id

    def example(self, rng: np.random.Generator, shape: Shape) -> dict[str, Tensor]:
        text = self._windows.draw(rng, shape.context_length)
        text = cut_at_times(rng, text, shape.segment_length, self._pad_share)
        return reconstruction_example(
            text,
            self._prompt_ids,
            end_id=self._end_id,
            max_target=self._max_target,
            fill=(shape.segment_length, self._fill_id),
        )


class PassageReconstruction:
    """A piece of the context at random is shown, and its continuation written down: RCC's random-prompt reconstruction.

    https://arxiv.org/abs/2406.06110, section 3.3. Several short ones behind one context teach to find places in it at
    less cost.

    Args:
        shards: Documents.
        num_pieces: So many, one behind the other.
        target_length: Tokens to write down of each; fewer where the context ends before.
        min_shown: Tokens that are shown, at least,
        max_shown: and at most.
        cue_ids: Stand in front of the shown piece; nothing does in the paper.
        name: For tables.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        num_pieces: int = 1,
        target_length: int = 512,
        min_shown: int = 16,
        max_shown: int = 64,
        cue_ids: Sequence[int] = (),
        name: str = "passage",
    ):
        for key, value in (("num_pieces", num_pieces), ("target_length", target_length), ("min_shown", min_shown)):
            check_positive(key, value)
        if max_shown < min_shown:
            raise ValueError(f"max_shown is {max_shown} and min_shown {min_shown}; the first must not be less")
        self.name = name
        self._windows, self._num_pieces = ShardWindows(shards), num_pieces
        self._target_length, self._shown, self._cue_ids = target_length, (min_shown, max_shown), list(cue_ids)

    def example(self, rng: np.random.Generator, shape: Shape) -> dict[str, Tensor]:
        context = self._windows.draw(rng, shape.context_length)
        return build_example(context, [part for _ in range(self._num_pieces) for part in self._piece(rng, context)])

    def _piece(self, rng: np.random.Generator, context: np.ndarray) -> list[tuple[Ids, bool]]:
        shown = int(rng.integers(self._shown[0], self._shown[1] + 1))
        if shown >= len(context):
            raise ValueError(
                f"a piece of {shown} tokens is to be shown of a context of {len(context)}; lower max_shown"
            )
        target = min(self._target_length, len(context) - shown)
        start = int(rng.integers(0, len(context) - shown - target + 1))
        middle = start + shown
        return [(self._cue_ids, False), (context[start:middle], False), (context[middle : middle + target], True)]
