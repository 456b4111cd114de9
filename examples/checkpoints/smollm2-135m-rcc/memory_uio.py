# SPDX-License-Identifier: Apache-2.0
"""The UIO scheme: `<mem>` tokens behind each segment, whose states of every layer become keys and values."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapters_rcc import LayerAdapters, SlotVectors, make_adapters
from .families_rcc import adaptable_linears, choose_linears, layer_windows
from .hooks_rcc import install_hooks
from .memory import MemoryScheme
from .passes_rcc import Pass, enter_pass
from .slot_passes_rcc import (
    append_states,
    decode_amid,
    empty_states,
    new_cache,
    project_slots,
    put_slots,
    recorded,
    rotate_kept,
)

FUSED = ("qkv_proj", "query_key_value")
"""Maps that make queries, keys and values in one, as some bases have them."""


@dataclass(frozen=True, kw_only=True)
class UIOOptions:
    """Options of the UIO scheme.

    Attributes:
        slot_vectors: None for one `<mem>` vector that all slots begin as (the paper's), or a number: so many vectors,
            one for each slot of a segment, in order; then no call may write more slots a segment. Only with one
            vector can slots of a memory be thinned out to a higher ratio.
        write_rank: rank of the compressor's adapters; 0 for none, which trains `<mem>` alone.
        read_rank: rank of the transfer head, adapters that act on slots alone; 0 for none.
        write_targets: last names of the linear maps that the compressor adapts (such as "q_proj"). None for the
            paper's: those of queries and values, or a base's map of queries, keys and values in one.
        read_targets: those of the transfer head. None for the paper's: keys and values, or the map of all three.
        adapter_scale: factor on the adapters' update (LoRA's alpha over rank).
    """

    slot_vectors: int | None = None
    write_rank: int = 128
    read_rank: int = 128
    write_targets: tuple[str, ...] | None = None
    read_targets: tuple[str, ...] | None = None
    adapter_scale: float = 4.0

    def __post_init__(self):
        for name in ("write_rank", "read_rank"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative; give 0 for no adapter, or a rank")
        if self.slot_vectors is not None and self.slot_vectors < 1:
            raise ValueError(
                f"slot_vectors={self.slot_vectors} is below 1; give the most slots that a segment will have, or None "
                "for one vector for all"
            )
        for name in ("write_targets", "read_targets"):
            if getattr(self, name) is not None:  # JSON has lists only
                object.__setattr__(self, name, tuple(getattr(self, name)))
        useless = set(self.read_targets or ()) - {"k_proj", "v_proj", *FUSED}
        if useless:
            raise ValueError(
                f"read_targets {sorted(useless)} would have no effect: of a slot only key and value are read. Choose "
                f"of k_proj, v_proj, or where a base has these in one, {', '.join(FUSED)}"
            )


class UIOScheme(MemoryScheme):
    """Unbiased incremental optimisation's memory (https://arxiv.org/abs/2406.18173, section 3).

    The compressor is the base with write adapters. It sees a segment and behind it M `<mem>` rows, all of which begin
    as the embedding of the end of text plus a trained vector. The mask of that one pass: a token sees the tokens up to
    itself and no `<mem>`; `<mem>` i, from 0, sees the first (i + 1) r tokens and itself, and stands at (i + 1) r, just
    behind them. Memory of layer l: the `<mem>` rows of its input, h (the paper takes them behind the layer's input
    norm, which here is the decoder layer's own when it makes keys and values of h, with the same weights). A slot's
    key and value are

        K = (W_K + scale B_K A_K) norm(h),  V = (W_V + scale B_V A_V) norm(h)

    with B A the transfer head. All other rows of the decoder are the plain base, but that they attend to slots.

    Two passes compute that one where no graph is kept. Tokens are blind to `<mem>`: their rows are those of a pass over
    the segment alone, which is plainly causal (no mask, any kernel), and all that `<mem>` rows ever see of them are its
    keys and values. So the second pass has the M rows alone as queries, with these as its past, and only it has a mask,
    `[M, W + M]`. Kernels that take none but padding (flash and flex attention) have each `<mem>` as a row of the batch,
    padded to its prefix.

    In training it is the one pass with its mask `[W + M, W + M]`: keys and values that leave layers by a side door are
    nothing for compiled layers or sharded weights. (With those kernels it is the two all the same, with many copies of
    keys and values: train with "sdpa".)

    A state is a tuple of L tensors `[B, M, D]`; kept, one pair (key, value) `[B, H, M, D]` per layer, with keys of
    position 0.
    """

    name = "uio"
    independent_writes = True
    adapts_tokens = False
    Options = UIOOptions
    options: UIOOptions

    @property
    def nested_ratios(self) -> bool:
        # slot 2i + 1 at ratio r and slot i at 2r see the same tokens from the same place, and no slot sees another
        return self.options.slot_vectors is None

    def build(self, decoder):
        options, last = self.options, len(decoder.layers) - 1
        if last == 0:
            raise ValueError(
                "scheme 'uio' needs a base of two layers or more: what <mem> is in the first layer depends on no token"
            )
        for index, layer in enumerate(decoder.layers):
            linears = adaptable_linears(layer)
            writers = choose_linears(linears, options.write_targets or _usual(linears, ("q_proj", "v_proj")))
            readers = choose_linears(linears, options.read_targets or _usual(linears, ("k_proj", "v_proj")))
            # what the compressor's last layer puts out is no state: adapters there would never get a gradient
            write = make_adapters(writers, options.write_rank if index < last else 0, options.adapter_scale)
            read = make_adapters(readers, options.read_rank, options.adapter_scale)
            vectors = SlotVectors(decoder.config.hidden_size, options.slot_vectors) if index == 0 else None
            layer.rcc = LayerAdapters(write, read, None, vectors)

    def empty(self, decoder, batch_size):
        return empty_states(decoder, batch_size)

    def write(self, decoder, state, segment, ratio):
        self._check(decoder, segment.shape[1], ratio)
        install_hooks(decoder.layers)
        takes_mask = any(kernel in decoder.config._attn_implementation for kernel in ("eager", "sdpa"))
        if takes_mask and torch.is_grad_enabled():
            inputs = _behind_tokens(decoder, segment, ratio)
        else:
            inputs = (_in_one_row if takes_mask else _each_a_row)(decoder, _tokens_alone(decoder, segment), ratio)
        num_slots, taken = segment.shape[1] // ratio, {}

        def take(index: int, layer: nn.Module, hidden: Tensor) -> Tensor | None:
            rows = hidden.reshape(len(segment), -1, hidden.shape[-1])
            slots = rows[:, -num_slots:]
            if index:
                taken[index] = slots.contiguous()  # a view would keep the inputs of all layers
                return None
            taken[index] = layer.rcc.mark(slots)
            return put_slots(rows, taken[index], rows.shape[1] - num_slots).view_as(hidden)

        with enter_pass(Pass("write", take)):
            decoder(**inputs, use_cache=False)
        return append_states(state, taken)

    def _check(self, decoder, length: int, ratio: int) -> None:
        limit, vectors = getattr(decoder.config, "max_position_embeddings", None), self.options.slot_vectors
        if limit is not None and length >= limit:
            raise ValueError(
                f"a segment of {length} tokens leaves no position for the <mem> behind it: the base was trained for "
                f"{limit}. Use a shorter segment_length"
            )
        if vectors is not None and length // ratio > vectors:
            raise ValueError(
                f"ratio={ratio} makes {length // ratio} slots of a segment of {length} tokens, and there are "
                f"slot_vectors={vectors}. Use a higher ratio, or make the compressor with more vectors, or one for all"
            )

    def _enter(self, state: tuple[Tensor, ...], start: int = 0, rows: Tensor | None = None) -> Pass:
        """The pass in which M rows of each layer's input, from `start` on, are `state`."""

        def put(index: int, layer: nn.Module, hidden: Tensor) -> Tensor:
            return put_slots(hidden, state[index].to(hidden.device, hidden.dtype), start)

        return Pass("read", put, rows)

    def keep(self, decoder, state):
        return tuple(project_slots(decoder, self._enter(state), state))

    def read(self, decoder, kept, position_ids, mask, head=None):
        return rotate_kept(decoder, kept, position_ids)

    def decode(self, decoder, state, inputs_embeds, mask, position_ids, num_head=0, rows=None, **kwargs):
        num_slots = state[0].shape[1]
        places = torch.arange(inputs_embeds.shape[1] + num_slots, device=inputs_embeds.device)
        is_slot = ((places >= num_head) & (places < num_head + num_slots))[None, :, None]
        entering = self._enter(state, num_head, is_slot)
        return decode_amid(decoder, entering, num_slots, inputs_embeds, mask, position_ids, num_head, **kwargs)


def _usual(linears: dict[str, nn.Linear], names: tuple[str, ...]) -> tuple[str, ...]:
    """The last names `names`, or that of the map which makes queries, keys and values in one."""
    known = {name.rpartition(".")[2] for name in linears}
    return tuple(name for name in FUSED if name in known) or names


def _start_ids(decoder, shape: tuple[int, int], device) -> Tensor:
    """Ids of what `<mem>` begins as: the end of text, or of a base that has none, the first token."""
    end = decoder.config.eos_token_id
    first = end[0] if isinstance(end, (list, tuple)) else end
    return torch.full(shape, first or 0, dtype=torch.long, device=device)


def _mask(decoder, length: int, ends: Tensor, batch_size: int, first: int) -> Tensor | dict[str, Tensor]:
    """Rows of the one pass's mask from `first` on, `[B, 1, W + M - first, W + M]`: 0 where a row sees, else -inf.

    Of a base whose layers see differently far, one for each kind of layer.
    """
    tokens = torch.arange(length, device=ends.device)
    places, last = torch.cat([tokens, ends]), torch.cat([tokens, ends - 1])
    itself = torch.eye(len(places), dtype=torch.bool, device=ends.device)[:, length:]

    def added(window: int | None) -> Tensor:
        seen = tokens <= last[:, None]
        if window is not None:
            seen = seen & (places[:, None] - tokens < window)
        visible = torch.cat([seen, itself], 1)[first:]
        mask = torch.zeros(visible.shape, dtype=decoder.dtype, device=ends.device).masked_fill(~visible, -torch.inf)
        return mask.expand(batch_size, 1, -1, -1)

    windows = layer_windows(decoder.config)
    return {kind: added(window) for kind, window in windows.items()} if isinstance(windows, dict) else added(windows)


def _ends(length: int, ratio: int, device) -> Tensor:
    """Where the `<mem>` of a segment stand, `[M]`: each just behind the tokens that it sees."""
    return torch.arange(ratio, length + 1, ratio, device=device)


def _behind_tokens(decoder, segment: Tensor, ratio: int) -> dict:
    """Inputs of the one pass, over tokens and `<mem>`, `[B, W + M]`."""
    (batch_size, length), device = segment.shape[:2], segment.device
    ends = _ends(length, ratio, device)
    starts = _start_ids(decoder, (batch_size, len(ends)), device)
    if segment.is_floating_point():
        rows = {"inputs_embeds": torch.cat([segment, decoder.get_input_embeddings()(starts).to(segment)], 1)}
    else:
        rows = {"input_ids": torch.cat([segment, starts], 1)}
    places = torch.cat([torch.arange(length, device=device), ends]).expand(batch_size, -1)
    return {**rows, "attention_mask": _mask(decoder, length, ends, batch_size, 0), "position_ids": places}


def _tokens_alone(decoder, segment: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The first of two passes: each layer's keys and values `[B, H, W, D]` of a segment's tokens."""
    cache = new_cache(decoder)
    name = "inputs_embeds" if segment.is_floating_point() else "input_ids"
    with enter_pass(Pass("write")):
        decoder(**{name: segment}, past_key_values=cache, use_cache=False)
    return recorded(cache)


def _in_one_row(decoder, past: list[tuple[Tensor, Tensor]], ratio: int) -> dict:
    """Inputs of the second of two passes, over `<mem>` rows `[B, M]` behind keys and values of the tokens."""
    keys, _ = past[0]
    batch_size, length = len(keys), keys.shape[-2]
    ends = _ends(length, ratio, keys.device)
    return {
        "input_ids": _start_ids(decoder, (batch_size, len(ends)), keys.device),
        "attention_mask": _mask(decoder, length, ends, batch_size, length),
        "position_ids": ends.expand(batch_size, -1),
        "past_key_values": new_cache(decoder, past),  # a cache of its own, or replayed layers of the first pass see it
    }


def _each_a_row(decoder, past: list[tuple[Tensor, Tensor]], ratio: int) -> dict:
    """As `_in_one_row` with every `<mem>` a row of its own, `[B * M, 1]`, and what it does not see as padding.

    Keys and values are copied for every slot, hence where there is no other way.
    """
    keys, _ = past[0]
    batch_size, length, device = len(keys), keys.shape[-2], keys.device
    ends = _ends(length, ratio, device)
    # padding in front: a window that slides over entries then ends where it should
    source = torch.arange(length, device=device) - (length - ends[:, None])

    def prefixes(part: Tensor) -> Tensor:
        """`[B, H, W, D]` to `[B * M, H, W, D]`."""
        return part.transpose(1, 2)[:, source.clamp(min=0).to(part.device)].flatten(0, 1).transpose(1, 2)

    seen = torch.cat([source >= 0, torch.ones_like(ends[:, None], dtype=torch.bool)], 1).long()
    return {
        "input_ids": _start_ids(decoder, (batch_size * len(ends), 1), device),
        "attention_mask": seen.repeat(batch_size, 1),
        "position_ids": ends.repeat(batch_size)[:, None],
        "past_key_values": new_cache(decoder, [(prefixes(k), prefixes(v)) for k, v in past]),
    }
