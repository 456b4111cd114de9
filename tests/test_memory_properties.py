# SPDX-License-Identifier: Apache-2.0
"""Random programs of operations on memories give, to the last bit, what compressing the same source text gives.

Beside every memory stands its source: for each row the tokens, and the ratio of each whole segment. What is expected
of a memory follows from these alone, by compressing single segments.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from tiny import pad, ratio_of_norms, rcc_model, text_config

from rcc_hf import RCCForCausalLM, RCCMemory
from rcc_hf.modeling.memory_rcc import WIRINGS

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

SEGMENT = 4
RATIOS = (1, 2, 4)
MAX_ROWS, MAX_SEGMENTS = 4, 8


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models of this size only lose time on more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Row:
    """The source of one row: its head, and tokens, of which those behind its `len(ratios)` segments are local."""

    tokens: tuple[int, ...] = ()
    ratios: tuple[int, ...] = ()
    head: tuple[int, ...] = ()

    @property
    def local(self) -> tuple[int, ...]:
        return self.tokens[len(self.ratios) * SEGMENT :]

    def append(self, tokens: tuple[int, ...], ratio: int) -> "Row":
        whole = (len(self.tokens) + len(tokens)) // SEGMENT
        return Row(self.tokens + tokens, self.ratios + (ratio,) * (whole - len(self.ratios)), self.head)

    def cut(self, start: int, stop: int | None) -> "Row":
        count = len(self.ratios)
        first = max(0, count + start) if start < 0 else start
        last = count + 1 if stop is None else max(0, count + stop) if stop < 0 else stop
        kept = self.tokens[first * SEGMENT : max(first, last) * SEGMENT]
        return Row(kept, self.ratios[first : max(first, last)], self.head if first == 0 else ())


@cache
def model_of(wiring: str) -> RCCForCausalLM:
    small = text_config(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    small.num_key_value_heads = 1
    model = rcc_model(
        dtype=torch.float32,
        text_config=small,
        scheme_options={"wiring": wiring, "write_rank": 2, "read_rank": 2, "map_rank": 2},
        segment_length=SEGMENT,
        ratio=RATIOS[1],
        window=SEGMENT,
    )
    model.config.encode_batch_tokens = SEGMENT  # one at a time: rows of a batch are not equal to the last bit
    return model


@cache
def slots_of(wiring: str, segment: tuple[int, ...], ratio: int) -> tuple[tuple[torch.Tensor, ...], ...]:
    return model_of(wiring).compress(torch.tensor([segment]), ratio=ratio).layers


def check(wiring: str, memory: RCCMemory, rows: tuple[Row, ...]) -> None:
    """Every real slot and local token of every row is there, in order, and nothing else is."""
    assert memory.row_tokens == tuple(len(row.head + row.tokens) for row in rows)
    width = sum(memory.slot_counts)
    mask = torch.ones(len(rows), width) if memory.mask is None else memory.mask
    local_mask = torch.ones(memory.local_ids.shape) if memory.local_mask is None else memory.local_mask
    assert mask.shape == (len(rows), width)
    head_mask = torch.ones(memory.head_ids.shape) if memory.head_mask is None else memory.head_mask
    for i, row in enumerate(rows):
        assert memory.local_ids[i, local_mask[i].bool()].tolist() == list(row.local)
        assert memory.head_ids[i, head_mask[i].bool()].tolist() == list(row.head)
        blocks = [int(block.sum()) for block in mask[i].split(memory.slot_counts)]
        assert [n for n in blocks if n] == [SEGMENT // ratio for ratio in row.ratios]
        segments = [
            slots_of(wiring, row.tokens[j * SEGMENT : (j + 1) * SEGMENT], ratio) for j, ratio in enumerate(row.ratios)
        ]
        for layer, parts in enumerate(memory.layers):
            for part, slots in enumerate(parts):
                assert slots.shape[-2] == width
                found = slots[i][..., mask[i].bool(), :]
                if segments:
                    assert torch.equal(found, torch.cat([s[layer][part][0] for s in segments], -2))
                assert not slots[i][..., ~mask[i].bool(), :].any()


def check_layout(memory: RCCMemory, rows: tuple[Row, ...]) -> None:
    """Without gaps: as wide as the segments need, padding in front, no mask where nothing is padded."""
    most = max(len(row.ratios) for row in rows)
    sizes = [[0] * (most - len(row.ratios)) + [SEGMENT // ratio for ratio in row.ratios] for row in rows]
    assert memory.slot_counts == tuple(map(max, zip(*sizes, strict=True)))
    assert (memory.mask is None) == all(tuple(row) == memory.slot_counts for row in sizes)
    assert memory.num_local == max(len(row.local) for row in rows)
    assert (memory.local_mask is None) == (len({len(row.local) for row in rows}) == 1)
    assert memory.num_head == max(len(row.head) for row in rows)
    assert (memory.head_mask is None) == (len({len(row.head) for row in rows}) == 1)


class Program:
    """A pool of memories with their sources; operations take from it and put into it."""

    def __init__(self, wiring: str, draw: Callable):
        self.wiring, self.draw = wiring, draw
        self.pool: list[tuple[RCCMemory, tuple[Row, ...]]] = []
        self.compress()

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def pick(self) -> tuple[RCCMemory, tuple[Row, ...]]:
        return self.pool[-1 - self.number(0, len(self.pool) - 1)]

    def put(self, memory: RCCMemory, rows: tuple[Row, ...], dense: bool = True) -> None:
        check(self.wiring, memory, rows)
        if dense:
            check_layout(memory, rows)
        self.pool.append((memory, rows))

    def text(self, batch_size: int) -> list[tuple[int, ...]]:
        """Few different tokens, so that few different segments have to be compressed."""
        rows = []
        for _ in range(batch_size):
            first, length = self.number(0, 3), self.number(0, 3 * SEGMENT)
            rows.append(tuple(3 + (first + i) % 5 for i in range(length)))
        return rows

    def grow(self, memory: RCCMemory | None, rows: tuple[Row, ...]) -> None:
        text, ratio = self.text(len(rows)), self.draw(st.sampled_from(RATIOS))
        head = self.number(0, 3) if memory is None else 0

        def grown_row(row: Row, part: tuple[int, ...]) -> Row:
            return replace(row.append(part[head:], ratio), head=row.head + part[:head])

        new = tuple(grown_row(row, part) for row, part in zip(rows, text, strict=True))
        if memory is None and not any(row.ratios for row in new):
            text[0] = tuple(range(3, 3 + SEGMENT + head))
            new = (grown_row(Row(), text[0]), *new[1:])
        assume(max(len(row.ratios) for row in new) <= MAX_SEGMENTS)
        ids, mask = pad([torch.tensor(part, dtype=torch.long) for part in text], self.draw(st.sampled_from(SIDES)))
        head_length = head if memory is None else None
        grown = model_of(self.wiring).compress(ids, mask, memory=memory, ratio=ratio, head_length=head_length)
        self.put(grown, new, dense=memory is None)

    def compress(self) -> None:
        self.grow(None, (Row(),) * self.number(1, 2))

    def append(self) -> None:
        self.grow(*self.pick())

    def slice(self) -> None:
        memory, rows = self.pick()
        start, stop = self.number(-3, 4), self.draw(st.none() | st.integers(-3, 6))
        self.put(memory.slice(start, stop), tuple(row.cut(start, stop) for row in rows))

    def concatenate(self) -> None:
        first, second = self.pick(), self.pick()
        uneven = len(first[1]) != len(second[1])
        if uneven or any(row.local for row in first[1]) or any(row.head for row in second[1]):
            with pytest.raises(ValueError, match=r"rows and the last one|raw local tokens|raw tokens \(its head\)"):
                RCCMemory.concatenate([first[0], second[0]])
            second = (first[0].slice(1, -1), tuple(row.cut(1, -1) for row in first[1]))
            first = (first[0].slice(0, -1), tuple(row.cut(0, -1) for row in first[1]))
        pairs = zip(first[1], second[1], strict=True)
        rows = tuple(Row(a.tokens + b.tokens, a.ratios + b.ratios, a.head) for a, b in pairs)
        assume(max(len(row.ratios) for row in rows) <= MAX_SEGMENTS)
        self.put(RCCMemory.concatenate([first[0], second[0]]), rows)

    def stack(self) -> None:
        first, second = self.pick(), self.pick()
        assume(len(first[1]) + len(second[1]) <= MAX_ROWS)
        self.put(RCCMemory.stack([first[0], second[0]]), first[1] + second[1])

    def unstack(self) -> None:
        memory, rows = self.pick()
        singles = memory.unstack()
        assert len(singles) == len(rows)
        for single, row in zip(singles, rows, strict=True):
            self.put(single, (row,))

    def select(self) -> None:
        memory, rows = self.pick()
        order = [self.number(0, len(rows) - 1) for _ in range(self.number(1, 3))]
        self.put(memory.select(torch.tensor(order)), tuple(rows[i] for i in order), dense=False)

    def save_and_load(self) -> None:
        memory, rows = self.pick()
        with tempfile.TemporaryDirectory() as folder:
            memory.save_pretrained(folder)
            loaded = RCCMemory.from_pretrained(folder)
        assert (loaded.slot_counts, loaded.origin) == (memory.slot_counts, memory.origin)
        self.put(loaded, rows, dense=False)


SIDES = ("left", "right")
OPERATIONS = ("append", "concatenate", "slice", "save_and_load", "stack", "unstack", "select", "compress")


def run_program(wiring: str, draw: Callable) -> None:
    program = Program(wiring, draw)
    for operation in draw(st.lists(st.sampled_from(OPERATIONS), min_size=1, max_size=8)):
        getattr(program, operation)()
    memory, rows = program.pool[-1]
    # two layouts of one content: sums over more zeros are rounded in another order
    prompt = torch.tensor([[5, 6]]).expand(len(rows), 2)
    model = model_of(wiring)
    with torch.no_grad():
        actual = model(prompt, memory=memory).logits
        expected = [model(prompt[:1], memory=single).logits for single in memory.unstack()]
    assert ratio_of_norms(actual, torch.cat(expected)) <= 1e-5
    small = [single.to_int8() for single in memory.unstack()]
    for single, again in zip(small, memory.to_int8().unstack(), strict=True):
        for name, tensor in single._tensors().items():
            assert torch.equal(tensor, again._tensors()[name])


def programs(max_examples: int, derandomize: bool) -> Callable:
    calm = settings(
        max_examples=max_examples,
        derandomize=derandomize,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: calm(given(wiring=st.sampled_from(WIRINGS), data=st.data())(test))


@programs(200, derandomize=True)
def test_random_programs(wiring, data):
    run_program(wiring, data.draw)


@pytest.mark.slow
@programs(10_000, derandomize=False)
def test_many_random_programs(wiring, data):
    run_program(wiring, data.draw)
