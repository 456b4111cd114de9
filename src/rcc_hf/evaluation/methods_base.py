# SPDX-License-Identifier: Apache-2.0
"""The interface of a context method: what it keeps of contexts, and answering from that; and the budget all share."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor
from transformers import PreTrainedModel

from rcc_hf.evaluation.methods_decoding import Step, check_ids, greedy, token_nll

__all__ = ["ContextMethod", "Reading", "backbone", "budget", "entry_nbytes", "is_rcc"]

_DEFAULT_SEGMENT_LENGTH = 1024


@dataclass(frozen=True)
class Reading:
    """What a method keeps of a batch of contexts.

    Attributes:
        nbytes: of each row, bytes of keys and values that lie in memory while it is decoded from. Ids do not count,
            nor does what was needed on the way.
        num_entries: of each row, entries of keys and values in each layer.
        kept: of each row, what the method keeps; private to it.
    """

    nbytes: tuple[int, ...]
    num_entries: tuple[int, ...]
    kept: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.kept)

    def select(self, rows: Sequence[int]) -> "Reading":
        """The given rows, in that order and as often as named: several questions about one context share it."""
        return Reading(*(tuple(part[row] for row in rows) for part in (self.nbytes, self.num_entries, self.kept)))

    @staticmethod
    def join(readings: "Sequence[Reading]") -> "Reading":
        """The rows of all readings of one method, in order."""
        parts = ((r.nbytes, r.num_entries, r.kept) for r in readings)
        return Reading(*(sum(column, ()) for column in zip(*parts, strict=True)))


class ContextMethod(ABC):
    """A way to keep contexts, which never sees the question.

    Args:
        model: an `RCCForCausalLM`, or (for every method but those that compress with it) a base model.
        ratio: source tokens per slot of `rcc`, whose entries are the budget of every bounded method.
        segment_length: for the budget; None for the model's own, or 1024 if it is a base model.
        head_length: likewise; 0 if it is a base model.
        prefix_length: tokens in front of every context that a tokenizer puts there (BOS): they begin what is kept,
            whatever that is, since a model that was trained with them goes wrong without.
        fill_id: fills the last segment of a context up, so that `rcc` compresses it whole; None leaves what is behind
            the last whole segment raw. Other methods read no filling, and have the budget that comes of it.

    Raises:
        ValueError: if the ratio does not divide the segment length.
    """

    name: ClassVar[str]

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        ratio: int,
        segment_length: int | None = None,
        head_length: int | None = None,
        prefix_length: int = 0,
        fill_id: int | None = None,
    ):
        self.model, self.ratio, self.prefix_length, self.fill_id = model, ratio, prefix_length, fill_id
        config = model.config if is_rcc(model) else None
        own = _DEFAULT_SEGMENT_LENGTH if config is None else config.segment_length
        self.segment_length = own if segment_length is None else segment_length
        own_head = 0 if config is None else config.head_length
        self.head_length = own_head if head_length is None else head_length
        self.budget(0)

    def budget(self, length: int) -> int:
        """Entries that a context of `length` tokens may take; see the function `budget`."""
        filled = self.fill_id is not None
        return budget(length, self.ratio, self.segment_length, self.head_length, filled=filled)

    @abstractmethod
    def read(self, contexts: Sequence[Tensor]) -> Reading:
        """Read contexts `[T_i]`, of any lengths, 0 included, as one batch.

        Raises:
            ValueError: if one has another shape, or there is none.
            TypeError: if one is no tensor of integers.
        """

    @abstractmethod
    def _start(self, rows: Sequence[Any]) -> Step:
        """The step that decodes behind the kept rows, from their beginning."""

    @abstractmethod
    def _split(self, row: Any) -> tuple[Any, Tensor]:
        """A kept row without its last entry, and the id `[1]` of that; all and `[0]` if that is not of a raw token."""

    def generate(
        self, reading: Reading, prompts: Sequence[Tensor], *, max_new_tokens: int, stop_ids: frozenset[int]
    ) -> list[Tensor]:
        """Continue prompts greedily.

        Args:
            reading: of as many contexts as there are prompts, or of one that all of them ask about.
            prompts: ids `[T_i]`, at least one each.
            max_new_tokens: at most so many.
            stop_ids: ids that end an answer.

        Returns:
            The new ids of each row without the stop id, on the CPU.

        Raises:
            ValueError: if there are not as many prompts as rows, one is empty, or no token may be generated.
        """
        check_ids("prompts", prompts, least=1)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; give at least 1")
        rows = _match(reading, len(prompts))
        found: dict[int, Tensor] = {}
        for group in _groups(self.model, prompts):
            step, asked = self._start([rows[i] for i in group]), [prompts[i] for i in group]
            made = greedy(step, asked, self.model.device, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
            found |= dict(zip(group, made, strict=True))
        return [found[i] for i in range(len(prompts))]

    def nll(self, reading: Reading, targets: Sequence[Tensor]) -> list[Tensor]:
        """Nats of each token of each target.

        Args:
            reading: as for `generate`.
            targets: ids `[T_i]`, at least one each.

        Returns:
            `[T_i]` each, in float64 on the CPU. The first is predicted by the last raw token that is kept; where there
            is none (no context, or nothing behind the last slot) it is nan.

        Raises:
            ValueError: if there are not as many targets as rows, or one is empty.
        """
        check_ids("targets", targets, least=1)
        rows, leads = zip(*(self._split(row) for row in _match(reading, len(targets))), strict=True)
        return token_nll(self._start(rows), leads, targets, self.model.device)


def _match(reading: Reading, count: int) -> tuple[Any, ...]:
    if len(reading) not in (1, count):
        raise ValueError(
            f"the reading has {len(reading)} rows, and there are {count} prompts or targets; give one for each row, "
            "bring the rows to that number with select(), or read one context that all of them share"
        )
    return reading.kept * (count // len(reading))


def _groups(model: PreTrainedModel, prompts: Sequence[Tensor]) -> list[list[int]]:
    """The prompts that are decoded together: all of them, or with a base whose attention slides those of one length.

    Sliding masks count columns, so that padding between entries and prompt would shorten the window of a row.
    """
    if getattr(model.config.get_text_config(), "sliding_window", None) is None:
        return [list(range(len(prompts)))]
    groups: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(len(prompt), []).append(index)
    return list(groups.values())


def budget(length: int, ratio: int, segment_length: int, head_length: int = 0, *, filled: bool = False) -> int:
    """Entries of keys and values that `rcc` has for a context of `length` tokens, and any bounded method may have.

    Every whole segment gives `segment_length / ratio` slots. What is behind the last one, and a head in front of the
    first, are raw tokens, one entry each; where it is `filled` up it is a segment too.

    Raises:
        ValueError: if the ratio does not divide the segment length.
    """
    if ratio < 1 or segment_length < 1 or segment_length % ratio:
        raise ValueError(f"ratio={ratio} does not divide segment_length={segment_length}; choose a divisor of it")
    head = min(length, head_length)
    segments, local = divmod(length - head, segment_length)
    if filled and local:
        segments, local = segments + 1, 0
    # a head stands in front of slots only; without a segment all is raw, which comes to the same number
    return head + segments * (segment_length // ratio) + local


def is_rcc(model: PreTrainedModel) -> bool:
    """Whether a model compresses; by name, since a checkpoint's own code has a class of its own."""
    return getattr(model.config, "model_type", None) == "rcc"


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The base's decoder, without a head: where its layers and rotary tables are."""
    found: Any = model.model.language_model if is_rcc(model) else model.base_model
    return cast(PreTrainedModel, found)


def entry_nbytes(model: PreTrainedModel) -> int:
    """Bytes of one entry: 2 x layers x key/value heads x head width x element size."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * model.dtype.itemsize)
