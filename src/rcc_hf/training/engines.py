# SPDX-License-Identifier: Apache-2.0
"""Gradients through long sequences: four ways to carry them from the readers of a memory back to who wrote it.

A sequence of T segments: each writes a memory of its own, without looking at others, and the loss of each is that of
reading the memories of all segments before it. The gradient with respect to what writes is

    G = sum over s of (sum over t > s of dJ_t / dm_s) dm_s / dTheta,

the gradient with respect to what reads is that of every J_t alone. So a loss can be propagated as far as detached
copies of the memories, where gradients add up, and its graph be given up at once (UIO-LLMs,
https://arxiv.org/abs/2406.18173, section 3.3); engines differ in how they get from there to the weights.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["ENGINES", "Memory", "Problem", "choose_engine", "full", "reservoir", "truncated", "two_pass"]

ENGINES = ("full", "truncated", "two-pass", "reservoir")
"""Names of the engines."""

Memory = tuple[Tensor, ...]
"""What one segment leaves behind: a tensor for each layer."""


class Problem(Protocol):
    """A sequence to take gradients of.

    Attributes:
        num_segments: T.
        at_a_time: Segments that are written together where no graph is kept for longer.
    """

    num_segments: int
    at_a_time: int

    def write(self, segments: Sequence[int]) -> list[Memory]:
        """The memories of some segments, with a graph if gradients are on."""

    def loss(self, segment: int, memories: Sequence[Memory]) -> Tensor:
        """The loss of a segment that reads the memories of all before it; a scalar, in its share of the total."""

    def backward(self, loss: Tensor) -> None:
        """Propagate a loss, scaled if mixed precision asks for it."""


class _Leaf:
    """A memory as readers see it: detached, with a place where their gradients add up.

    Attributes:
        memory: What readers see.
        graph: The memory with its graph, if that is kept.
    """

    def __init__(self, memory: Memory, *, keeps_graph: bool = True):
        # what depends on no weight, such as plain embeddings, needs no gradient
        self.memory = tuple(x.detach().requires_grad_(x.requires_grad or not keeps_graph) for x in memory)
        self.graph: Memory | None = memory if keeps_graph else None

    def forget(self) -> None:
        """Take no gradients any more."""
        self.graph = None
        for x in self.memory:
            x.requires_grad_(False)
            x.grad = None

    def propagate(self) -> None:
        """From here to the weights; then forget."""
        assert self.graph is not None
        _propagate([self], [self.graph])


def full(problem: Problem) -> Tensor:
    """One graph of everything. Exact; memory grows with the length, for readers with its square.

    Returns:
        The sum of all losses, detached; as all engines do.
    """
    memories = problem.write(range(problem.num_segments - 1))
    total = torch.stack([problem.loss(t, memories[:t]) for t in range(1, problem.num_segments)]).sum()
    problem.backward(total)
    return total.detach()


def truncated(problem: Problem, size: int) -> Tensor:
    """Losses reach the last `size` segments before them. Biased: what was written long ago gets no credit.

    Memory: the graphs of `size` segments, and one reader's.
    """
    leaves: list[_Leaf] = []
    losses = []
    for t in range(1, problem.num_segments):
        leaves.append(_Leaf(*problem.write([t - 1])))
        losses.append(_read(problem, t, leaves))
        if t >= size:
            leaves[t - size].propagate()
    for leaf in leaves:
        if leaf.graph is not None:
            leaf.propagate()
    return torch.stack(losses).sum()


def two_pass(problem: Problem) -> Tensor:
    """All is written without a graph, read, and written again with one. Exact, dropout included.

    Memory: the graph of `at_a_time` segments or of one reader, whatever the length; time: one more pass of the
    compressor (gradient caching, as https://arxiv.org/abs/2101.06983 has it for contrastive losses).
    """
    parts = list(_batches(range(problem.num_segments - 1), problem.at_a_time))
    leaves, states = [], []
    for part in parts:
        states.append(_random_states())
        with torch.no_grad():
            leaves += [_Leaf(memory, keeps_graph=False) for memory in problem.write(part)]
    losses = [_read(problem, t, leaves[:t]) for t in range(1, problem.num_segments)]
    for part, state in zip(parts, states, strict=True):
        with _replayed(state):
            again = problem.write(part)
        _propagate([leaves[s] for s in part], again)
    return torch.stack(losses).sum()


def reservoir(problem: Problem, size: int, generator: random.Random, *, corrected: bool = True) -> Tensor:
    """Graphs of `size` segments are kept, each earlier segment's with the same chance; its share is made up for.

    Unbiased, at one backward pass of the compressor for about `size` x (1 + ln(T / size)) segments: UIO-LLMs, section
    3.3 and appendix. Without the correction (as in the released code) what writes gets 2 size / T of its gradient.

    Args:
        problem: The sequence.
        size: Segments held.
        generator: Draws who is held.
        corrected: Whether a loss with t segments before it counts max(1, t / size) times for what writes.
    """
    leaves: list[_Leaf] = []
    held: list[int] = []
    losses = []
    for t in range(1, problem.num_segments):
        written = t - 1
        leaves.append(_Leaf(*problem.write([written])))
        place = len(held) if written < size else generator.randint(0, written)
        if place < size:
            if place < len(held):
                leaves[held[place]].propagate()
                held[place] = written
            else:
                held.append(written)
        else:
            leaves[written].forget()  # nobody has read it yet
        losses.append(_read(problem, t, leaves, factor=max(1.0, t / size) if corrected else 1.0))
    for index in held:
        leaves[index].propagate()
    return torch.stack(losses).sum()


def choose_engine(name: str, *, size: int, seed: int) -> Callable[[Problem], Tensor]:
    """An engine by its name.

    Args:
        name: Of `ENGINES`.
        size: Segments whose graphs truncated and reservoir keep.
        seed: Who is held in a reservoir.
    """
    if name == "truncated":
        return partial(truncated, size=size)
    if name == "reservoir":
        return partial(reservoir, size=size, generator=random.Random(seed))
    return {"full": full, "two-pass": two_pass}[name]


def _read(problem: Problem, segment: int, leaves: Sequence[_Leaf], factor: float = 1.0) -> Tensor:
    """Propagate a segment's loss to the leaves, where it counts `factor` times; the loss, detached."""
    tensors = [x for leaf in leaves for x in leaf.memory if x.requires_grad]
    before = [x.grad for x in tensors]
    if factor != 1:
        for x in tensors:
            x.grad = None
    loss = problem.loss(segment, [leaf.memory for leaf in leaves])
    problem.backward(loss)
    if factor != 1:
        for x, old in zip(tensors, before, strict=True):
            if x.grad is not None:
                x.grad.mul_(factor)
            if old is not None:
                x.grad = old if x.grad is None else x.grad.add_(old)
    return loss.detach()


def _propagate(leaves: Sequence[_Leaf], graphs: Sequence[Memory]) -> None:
    """One backward pass from leaves to what wrote them; then they are forgotten."""
    pairs = [
        (x, mine.grad)
        for leaf, graph in zip(leaves, graphs, strict=True)
        for x, mine in zip(graph, leaf.memory, strict=True)
        if x.requires_grad and mine.grad is not None
    ]
    if pairs:
        torch.autograd.backward([x for x, _ in pairs], [gradient for _, gradient in pairs])
    for leaf in leaves:
        leaf.forget()


def _batches(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _random_states() -> list[Tensor]:
    """States of the generators of the CPU and the current device, by which dropout is repeated."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_available() else states


@contextmanager
def _replayed(states: Sequence[Tensor]) -> Iterator[None]:
    """In the block random numbers are those that came after these states; behind it, what would have come anyway."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.set_rng_state(states[0])
        for state in states[1:]:
            torch.cuda.set_rng_state(state)
        yield
