# SPDX-License-Identifier: Apache-2.0
"""Losses from hidden states, without all logits at once: cross-entropy, and KL to a teacher.

Logits of 32 x 512 tokens over a vocabulary of 49,152 take 3 GB in float32, their gradient as much. Here only the
positions that predict a labelled token go through the head, a few thousand at a time; the gradient of each piece with
respect to the hidden states is taken at once, so that no piece is kept and none is computed twice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rcc_hf.objectives import IGNORED

__all__ = ["HeadLoss", "Teacher", "predicting_places"]

Head = Callable[[Tensor], Tensor]
"""From hidden states `[n, D]` to logits `[n, V]`, scaled as the base does."""


def predicting_places(labels: Tensor, multiple: int = 1) -> Tensor:
    """The positions whose next token is labelled, `[n]`, as indices into `labels` `[B, T]` laid out flat.

    The first token of a row has nothing before it that could predict it, and does not count.

    Args:
        multiple: n is one of it: places are added at the end of the first row, where nothing is predicted.
    """
    expected = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    places = (expected != IGNORED).flatten().nonzero().squeeze(1)
    return F.pad(places, (0, -len(places) % multiple), value=labels.shape[1] - 1)


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """What a student is to imitate.

    Attributes:
        hidden: `[n, D]`, the teacher's last hidden states at the places that predict what the student's n places do.
        weight: Factor of KL(teacher || student).
        temperature: Divides the logits of both; the result is multiplied by its square, so that gradients keep their
            size.
    """

    hidden: Tensor
    weight: float
    temperature: float = 1.0


Entropy = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def entropy_of(raw: Tensor, expected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over rows of logits `[n, V]`: cross-entropy, correct tokens, and labelled tokens, of labels `[n]`."""
    logits = _precise(raw)
    entropy = F.cross_entropy(logits, expected, reduction="sum", ignore_index=IGNORED)
    correct = (logits.detach().argmax(-1) == expected).sum()
    return entropy, correct, (expected != IGNORED).sum()


def _precise(raw: Tensor) -> Tensor:
    """In float32 at least."""
    return raw if raw.dtype == torch.float64 else raw.float()


class HeadLoss:
    """The loss of a batch as a function of the last hidden states, for `RCCForCausalLM.forward(hidden_loss=...)`.

    Losses are sums over labelled tokens in nats, divided by `num_items`; all sums are in float32.

    Attributes:
        sums: `[4]` after the call: cross-entropy, correct tokens, KL, labelled tokens. Not divided by anything.
    """

    def __init__(
        self,
        head: Head,
        weights: Sequence[Tensor],
        labels: Tensor,
        *,
        num_items: Tensor | int | None,
        places: Tensor | None = None,
        teacher: Teacher | None = None,
        chunk: int = 2048,
        entropy: Entropy = entropy_of,
    ):
        """Args:
            head: Gives the logits.
            weights: Parameters of the head; those that are trained get gradients.
            labels: `[B, T]`, -100 where nothing is predicted.
            num_items: Labelled tokens that the sum is divided by; None: those of this batch.
            places: `predicting_places(labels)`, if known: to find them waits for the device.
            teacher: What is imitated beside, if anything.
            chunk: Tokens whose logits exist at a time.
            entropy: `entropy_of`, which may be compiled.

        Raises:
            ValueError: the teacher has not as many places as the student.
        """
        self._head, self._weights = head, [weight for weight in weights if weight.requires_grad]
        self._places = predicting_places(labels) if places is None else places
        self._expected = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()[self._places]
        self._num_items, self._teacher, self._chunk, self._entropy = num_items, teacher, chunk, entropy
        if teacher is not None and len(teacher.hidden) != len(self._places):
            raise ValueError(
                f"{len(self._places)} tokens of labels are predicted and {len(teacher.hidden)} of teacher_labels; the "
                "k-th of one belongs to the k-th of the other, so an example must have as many of both"
            )
        self.sums: Tensor | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """The loss of hidden states `[B, T, D]`."""
        rows = hidden.flatten(0, 1)[self._places]
        weights = self._weights if torch.is_grad_enabled() else []
        loss, self.sums = _Chunked.apply(self._piece, self._chunk, rows, *weights)
        num_items = (self._expected != IGNORED).sum() if self._num_items is None else self._num_items
        return loss / (num_items.to(loss.device).clamp(min=1) if isinstance(num_items, Tensor) else max(1, num_items))

    def _piece(self, hidden: Tensor, where: slice) -> tuple[Tensor, Tensor]:
        """Loss and sums of some rows `[m, D]`."""
        logits = self._head(hidden)
        if self._teacher is not None:
            logits = _precise(logits)  # once, for both
        entropy, correct, count = self._entropy(logits, self._expected[where])
        if self._teacher is None:
            divergence, loss = torch.zeros_like(entropy), entropy
        else:
            divergence = self._divergence(logits, where)
            loss = entropy + self._teacher.weight * divergence
        return loss, torch.stack([entropy.detach(), correct.to(entropy), divergence.detach(), count.to(entropy)])

    def _divergence(self, logits: Tensor, where: slice) -> Tensor:
        """The sum of KL(teacher || student), without places that were added and predict nothing."""
        assert self._teacher is not None
        temperature, counts = self._teacher.temperature, self._expected[where] != IGNORED
        with torch.no_grad():
            target = F.log_softmax(self._head(self._teacher.hidden[where]).to(logits.dtype) / temperature, -1)
        ours = F.log_softmax(logits / temperature, -1)
        found = F.kl_div(ours, target, reduction="none", log_target=True).sum(-1)
        return (found * counts).sum() * temperature**2


Piece = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


class _Chunked(torch.autograd.Function):
    """A sum over pieces of rows whose gradient is taken piece by piece in forward."""

    @staticmethod
    def forward(ctx: Any, piece: Piece, chunk: int, rows: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        wanted = [rows, *weights] if rows.requires_grad else [*weights]
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        loss, sums = rows.new_zeros((), dtype=dtype), rows.new_zeros(4, dtype=dtype)
        into_rows = torch.empty_like(rows) if rows.requires_grad else None
        into_weights = [torch.zeros_like(weight) for weight in weights]
        for start in range(0, len(rows), chunk):
            where = slice(start, start + chunk)
            part = rows[where].detach().requires_grad_(into_rows is not None)
            with torch.set_grad_enabled(bool(wanted)):
                new_loss, new_sums = piece(part, where)
            loss += new_loss.detach()
            sums += new_sums
            if not wanted:
                continue
            found = list(torch.autograd.grad(new_loss, [part, *weights] if into_rows is not None else weights))
            if into_rows is not None:
                into_rows[where] = found.pop(0)
            for total, new in zip(into_weights, found, strict=True):
                total += new
        ctx.save_for_backward(*([] if into_rows is None else [into_rows]), *into_weights)
        ctx.has_rows = into_rows is not None
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        found = [(saved * gradient).to(saved.dtype) for saved in ctx.saved_tensors]
        return None, None, *([] if ctx.has_rows else [None]), *found
