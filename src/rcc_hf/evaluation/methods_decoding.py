# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding and the loss of given tokens, the same for every method: what differs is the step of the model.

The library's `generate` is not used: it would add what a model's generation config names (a repetition penalty, for
example), and does not know caches whose entries are fewer than the tokens that they stand for.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Step", "check_ids", "greedy", "pad_back", "pad_front", "token_nll"]

Step = Callable[[Tensor, Tensor | None, int], Tensor]
"""Decodes ids `[B, T]` behind all before, with a mask `[B, T]` (0 at padding; None if there is none), and gives the
logits of the last columns, `[B, n, V]`; all of them for n = 0."""

_CHUNK = 256


def check_ids(name: str, rows: Sequence[Tensor], *, least: int = 0) -> None:
    """Refuse rows that are no ids `[T]`.

    Raises:
        ValueError: one has another shape, is too short, or there is none.
        TypeError: one is no tensor of integers.
    """
    if not len(rows):
        raise ValueError(f"{name} are none; give at least one")
    for index, row in enumerate(rows):
        if not isinstance(row, Tensor) or row.is_floating_point() or row.dtype == torch.bool:
            found = row.dtype if isinstance(row, Tensor) else type(row).__name__
            raise TypeError(f"{name}[{index}] is {found}; give ids as a tensor of integers")
        if row.ndim != 1 or len(row) < least:
            raise ValueError(f"{name}[{index}] has shape {tuple(row.shape)}; give [T] with T of at least {least}")


def pad_front(rows: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Rows of ids `[T_i]` as one batch `[B, T]` with padding in front, and its mask (None if there is none)."""
    longest = max(map(len, rows))
    ids = torch.stack([F.pad(row, (longest - len(row), 0)) for row in rows]).to(device)
    if all(len(row) == longest for row in rows):
        return ids, None
    sizes = torch.tensor([len(row) for row in rows], device=device)[:, None]
    return ids, (torch.arange(longest, device=device) >= longest - sizes).long()


def pad_back(rows: Sequence[Tensor], device: torch.device) -> Tensor:
    """Rows of ids `[T_i]` as one batch `[B, T]` with padding behind, which no real token sees."""
    longest = max(map(len, rows))
    return torch.stack([F.pad(row, (0, longest - len(row))) for row in rows]).to(device)


@torch.no_grad()
def greedy(
    step: Step, prompts: Sequence[Tensor], device: torch.device, *, max_new_tokens: int, stop_ids: frozenset[int]
) -> list[Tensor]:
    """The most likely continuation of each prompt `[T_i]`, up to but without the first stop id; on the CPU."""
    logits = step(*pad_front(prompts, device), 1)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    steps = []
    while True:
        new = logits[:, -1].argmax(-1)
        done |= torch.isin(new, stops)
        steps.append(new)
        if len(steps) == max_new_tokens or bool(done.all()):
            break
        logits = step(new[:, None], None, 1)
    rows = torch.stack(steps, 1).cpu()
    ends = [next((i for i, token in enumerate(row.tolist()) if token in stop_ids), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


@torch.no_grad()
def token_nll(step: Step, leads: Sequence[Tensor], targets: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Nats of each token of each target `[T_i]`, in float64 on the CPU, decoded a few hundred columns at a time.

    Args:
        step: decodes behind what comes before leads and targets.
        leads: of each row a raw token `[1]` that predicts the first token of its target, or none, `[0]`: then that
            one is nan.
        targets: ids `[T_i]`.
        device: where the model takes its ids.
    """
    rows = [torch.cat([lead.to(target), target]) for lead, target in zip(leads, targets, strict=True)]
    ids = pad_back(rows, device)
    losses = []
    for start in range(0, ids.shape[1] - 1, _CHUNK):
        chunk = ids[:, start : min(start + _CHUNK, ids.shape[1] - 1)]
        logits = step(chunk, None, 0)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        expected = ids[:, start + 1 : start + 1 + chunk.shape[1]]
        losses.append(F.cross_entropy(logits.transpose(1, 2), expected, reduction="none"))
    nats = torch.cat([torch.zeros(len(rows), 0, dtype=torch.float64), *(loss.cpu().double() for loss in losses)], 1)
    unknown = nats.new_full((1,), torch.nan)
    return [
        nats[i, : len(target)] if len(lead) else torch.cat([unknown, nats[i, : len(target) - 1]])
        for i, (lead, target) in enumerate(zip(leads, targets, strict=True))
    ]
