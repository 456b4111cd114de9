# SPDX-License-Identifier: Apache-2.0
"""`RCCStream`: tokens that come in forever, such as a chat, a log or a book, in bounded memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rcc_hf.modeling.checking_rcc import check_inputs, check_memory
from rcc_hf.modeling.compressed_ops_rcc import head_lengths, head_sizes
from rcc_hf.modeling.compressed_rcc import RCCMemory
from rcc_hf.modeling.modeling_rcc import RCCForCausalLM
from rcc_hf.modeling.rolling_rcc import Rolling
from rcc_hf.modeling.segments_rcc import HeadLength, expand_head_length, join, pack_left, row_lengths

NOT_OURS = {
    "memory": "the stream has its own",
    "past_key_values": "the stream has its own",
    "rolling": "a stream always rolls",
    "compress": "a stream always compresses",
    "ratio": "give it to RCCStream",
    "window": "give it to RCCStream",
    "head_length": "give it to RCCStream",
    "max_slots": "give it to RCCStream",
    "when_full": "give it to RCCStream",
    "inputs_embeds": "a stream keeps ids",
    "max_length": "a stream has no length to count from; give max_new_tokens",
    "return_dict_in_generate": "a stream returns the new tokens",
}
"""Arguments of `model.generate` that `RCCStream.generate` does not take, and why."""


class RCCStream:
    """A text that goes on: the newest tokens stay raw, the oldest segment is compressed when the window is full.

    All that a stream is, but its options, is one value, `memory`: `[head | slots | raw tokens]`. Save that to save
    the stream, and give it to a new one to resume. The slots are those of compressing the whole text in one go. After
    an error a stream is as it was before.

    Args:
        model: what compresses and generates; any number of streams may share it.
        window: raw tokens that stay behind the slots, at least one segment; None for `config.window`.
        ratio: source tokens per slot; None for the configuration's.
        head_length: tokens at the start of each row that stay raw in front of the slots: one number, or one for each
            row; None for the configuration's.
        head_ids: instead: such tokens `[B, H]`, with which the stream begins; one row serves any number of rows.
        max_slots: slots that a row may have; None for any number.
        when_full: "error", "drop" (forget the oldest segments) or "recompress" (them at higher ratios); see `Rolling`.
        memory: go on behind this memory.

    Raises:
        TypeError: if the ids are no integers, or `memory` is no memory.
        ValueError: if options exclude each other or cannot be kept, or the memory comes from another model.
    """

    def __init__(
        self,
        model: RCCForCausalLM,
        *,
        window: int | None = None,
        ratio: int | None = None,
        head_length: HeadLength | None = None,
        head_ids: Tensor | None = None,
        max_slots: int | None = None,
        when_full: str = "error",
        memory: RCCMemory | None = None,
    ):
        if head_ids is not None and (head_length is not None or memory is not None):
            raise ValueError("head_ids are the whole beginning of a stream: leave head_length and memory out")
        config = model.config
        config.check_window(window)
        self.model = model
        self._backbone: Any = next(module for module in model.modules() if hasattr(module, "scheme"))
        self._window = config.window if window is None else window
        self._ratio = config.check_ratio(ratio)
        self._rolling = Rolling(max_slots=max_slots, when_full=when_full)
        self._rolling.check(self._backbone.scheme, config.segment_length // self._ratio)
        self._head_length: HeadLength = config.head_length if head_length is None else head_length
        self._memory: RCCMemory | None = None
        self._row_tokens: tuple[int, ...] = (0,)
        if memory is not None:
            check_memory(self._backbone, memory)
            self._check_head(memory, head_length)
            self._memory, self._row_tokens = self._rolling.bound(memory), memory.row_tokens
        if head_ids is not None:
            self._head_length = head_ids.shape[-1]
            self.append(head_ids)

    @property
    def memory(self) -> RCCMemory | None:
        """The stream as a value; None before the first token."""
        return self._memory

    @property
    def num_tokens(self) -> int:
        """Tokens that the longest row has seen, forgotten ones too (of a memory it went on behind: those it held)."""
        return max(self._row_tokens)

    @property
    def num_slots(self) -> int:
        """Slots of the row that has most."""
        return 0 if self._memory is None else self._memory.num_slots

    @property
    def num_local(self) -> int:
        """Raw tokens behind the slots of the row that has most."""
        return 0 if self._memory is None else self._memory.num_local

    @property
    def nbytes(self) -> int:
        """Bytes of the memory."""
        return 0 if self._memory is None else self._memory.nbytes

    def __repr__(self) -> str:
        return (
            f"RCCStream(num_tokens={self.num_tokens}, num_slots={self.num_slots}, num_local={self.num_local}, "
            f"nbytes={self.nbytes})"
        )

    @torch.no_grad()
    def append(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Take in more tokens.

        Args:
            input_ids: `[B, T]`, any number of tokens, padded on either side.
            attention_mask: `[B, T]`, 0 at padding; None if there is none.

        Raises:
            TypeError: if the ids are no integers.
            ValueError: if shapes or devices do not fit, or the slots exceed a budget that may not be exceeded.
        """
        self._check_ids(input_ids, attention_mask)
        memory, before = self._for_rows(len(input_ids))
        self._commit(self._extend(memory, input_ids, attention_mask), before, row_lengths(input_ids, attention_mask))

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **generate_kwargs: Any) -> Tensor:
        """Take in a prompt, generate behind it, past the window too, and take in what was generated.

        Of rows that end before others, the stream takes what comes up to and including their end token. Streamers and
        processors of logits see no more than the last segment of the prompt.

        Args:
            input_ids: `[B, T]`, at least one token in each row.
            attention_mask: `[B, T]`, 0 at padding, on either side; None if there is none.
            generate_kwargs: further arguments of `model.generate`: `max_new_tokens`, `do_sample`, `num_beams`,
                `streamer`, ...

        Returns:
            The new tokens `[B, n]`, padded behind their end as `model.generate` does it.

        Raises:
            TypeError: if the ids are no integers.
            ValueError: as `append` and `model.generate`; if a row has no token, or several texts per row are asked for.
        """
        _check_arguments(self.model, generate_kwargs)
        self._check_ids(input_ids, attention_mask)
        if 0 in row_lengths(input_ids, attention_mask):
            raise ValueError("generate() needs at least one token in each row of input_ids to go on from")
        ids, mask = pack_left(input_ids, attention_mask)
        cut = max(0, ids.shape[1] - self.model.config.segment_length)  # compress what is long only once
        memory, before = self._for_rows(len(ids))
        if cut:
            memory = self._extend(memory, ids[:, :cut], None if mask is None else mask[:, :cut])
        ids, mask = ids[:, cut:], None if mask is None else mask[:, cut:]
        untyped: Any = self.model  # generate's annotations leave out what it hands to the model
        output = untyped.generate(
            ids,
            attention_mask=torch.ones_like(ids) if mask is None else mask,
            memory=memory,
            rolling=True,
            window=self._window,
            ratio=self._ratio,
            max_slots=self._rolling.max_slots,
            when_full=self._rolling.when_full,
            return_dict_in_generate=False,
            **self._head_options(memory),
            **generate_kwargs,
        )
        new = output[:, ids.shape[1] :]
        new_mask = _until_end(new, self.model, generate_kwargs)
        lengths = zip(row_lengths(input_ids, attention_mask), row_lengths(new, new_mask), strict=True)
        self._commit(self._extend(memory, *join(ids, mask, new, new_mask)), before, [a + b for a, b in lengths])
        return new

    def _commit(self, memory: RCCMemory, before: Sequence[int], new: Sequence[int]) -> None:
        self._memory, self._row_tokens = memory, tuple(a + b for a, b in zip(before, new, strict=True))

    def _for_rows(self, batch_size: int) -> tuple[RCCMemory | None, list[int]]:
        """The memory and the tokens seen, for so many rows: one head serves many."""
        memory, seen = self._memory, self._row_tokens
        if memory is None:
            return None, [0] * batch_size
        if memory.batch_size != batch_size and len(seen) == 1 and memory.num_slots == memory.num_local == 0:
            return memory.expand(batch_size), list(seen) * batch_size
        if memory.batch_size != batch_size:
            raise ValueError(
                f"the stream has {memory.batch_size} rows and input_ids {batch_size}. Give one row of tokens for each, "
                "with an attention_mask of 0 where a row has nothing new"
            )
        return memory, list(seen)

    def _extend(self, memory: RCCMemory | None, ids: Tensor, mask: Tensor | None) -> RCCMemory:
        """A memory with more tokens behind it."""
        new = self.model.compress(
            ids, mask, memory=memory, window=self._window, ratio=self._ratio, **self._head_options(memory)
        )
        return self._rolling.bound(new)

    def _head_options(self, memory: RCCMemory | None) -> dict[str, Any]:
        """The `head_length` for a call behind a memory, whose own head may be full."""
        if memory is None:
            return {"head_length": self._head_length}
        lengths = head_lengths(memory, self._head_length)
        return {} if lengths == head_sizes(memory) else {"head_length": lengths}

    def _check_head(self, memory: RCCMemory, head_length: HeadLength | None) -> None:
        if head_length is None:
            return
        wanted = expand_head_length(head_length, memory.batch_size).tolist()
        if head_lengths(memory, head_length) != wanted:
            raise ValueError(
                f"head_length={head_length!r}, but the memory has heads of {head_sizes(memory)} tokens with text "
                "behind them. Leave it out: a memory that is gone on behind keeps its head"
            )

    def _check_ids(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        check_inputs(self._backbone, input_ids, attention_mask)
        if input_ids.ndim != 2:
            raise ValueError(f"a stream takes ids [batch, tokens], not inputs of shape {tuple(input_ids.shape)}")


def _setting(model: RCCForCausalLM, given: dict[str, Any], name: str) -> Any:
    """What `model.generate` takes for `name`: the argument, or else its configurations' value."""
    if name in given:
        return given[name]
    value = getattr(given.get("generation_config"), name, None)
    return getattr(model.generation_config, name, None) if value is None else value


def _check_arguments(model: RCCForCausalLM, given: dict[str, Any]) -> None:
    for name, reason in NOT_OURS.items():
        if name in given:
            raise ValueError(f"generate() of a stream does not take {name}: {reason}")
    copies = _setting(model, given, "num_return_sequences")
    if copies is not None and copies > 1:
        raise ValueError(
            f"num_return_sequences={copies}: a stream goes on with one text per row. Leave it out; to try several "
            "continuations, give several streams the memory of this one"
        )


def _until_end(new: Tensor, model: RCCForCausalLM, given: dict[str, Any]) -> Tensor | None:
    """A mask `[B, n]` of 1 up to the end token of each row, and 0 at the padding behind."""
    ends, padding = (_setting(model, given, name) for name in ("eos_token_id", "pad_token_id"))
    if ends is None or ends == []:
        return None  # no row waits for others
    ends = torch.as_tensor(ends, device=new.device).reshape(-1)
    is_end = torch.isin(new, ends).long()
    kept = is_end.cumsum(1) - is_end == 0
    if given.get("stop_strings") or given.get("stopping_criteria"):  # they leave no end token
        padding = ends[0] if padding is None else padding
        is_padding = (new == padding) & ~is_end.bool()
        kept &= (~is_padding).flip(1).long().cumsum(1).flip(1) > 0
    return None if bool(kept.all()) else kept.long()
