# SPDX-License-Identifier: Apache-2.0
"""UIO on a Llama base, written out as plainly and slowly as possible: the implementation is compared with it.

The compressor is one pass over a segment's tokens and, behind them, its `<mem>` rows, with the whole mask of
https://arxiv.org/abs/2406.18173, section 3. One row of a batch at a time, every head and every query on its own, no
cache, no hook, nothing of transformers.

`T` rows (tokens or slots), `D` width, `V` vocabulary, `M` slots. Everything is float64, but for two places where a
Llama of transformers computes in float32 whatever its dtype (root mean squares and rotary tables).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NaiveUIO:
    """A Llama base with a UIO compressor.

    Attributes:
        weights: all parameters by name, as `RCCForCausalLM.named_parameters` gives them.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        norm_eps: epsilon of the root mean square.
        rope_theta: base of the rotary frequencies.
        segment_length: tokens that are encoded together.
        end_of_text: id of the token as whose embedding `<mem>` begins.
        adapter_scale: factor on the update of every low-rank adapter.
    """

    weights: dict[str, Tensor]
    num_layers: int
    num_heads: int
    num_kv_heads: int
    norm_eps: float
    rope_theta: float
    segment_length: int
    end_of_text: int
    adapter_scale: float

    def logits(self, context: list[int], local: list[int], ratio: int) -> Tensor:
        """Logits `[T, V]` of the local tokens behind a context, of which what fills no segment stays raw."""
        states, tail = self.compress(context, ratio)
        return self.decode(states, self.embed(tail + local))[-len(local) :]

    def compress(self, context: list[int], ratio: int) -> tuple[list[Tensor], list[int]]:
        """For each layer the states `[M, D]` of all segments, and the tokens behind the last segment."""
        encoded = []
        while len(context) >= self.segment_length:
            segment, context = context[: self.segment_length], context[self.segment_length :]
            encoded.append(self.encode(segment, ratio))
        return [torch.cat([states[i] for states in encoded]) for i in range(self.num_layers)], context

    def encode(self, segment: list[int], ratio: int) -> list[Tensor]:
        """The compressor: the `<mem>` rows of every layer's input."""
        length = len(segment)
        count = length // ratio
        vector = self.weights["model.language_model.layers.0.rcc.mark.vector"]
        mem = [self.embed([self.end_of_text])[0] + (vector if vector.ndim == 1 else vector[i]) for i in range(count)]
        rows = torch.cat([self.embed(segment), torch.stack(mem)])
        positions = [*range(length), *((i + 1) * ratio for i in range(count))]
        mask = torch.zeros(length + count, length + count, dtype=torch.bool)
        for t in range(length):
            mask[t, : t + 1] = True  # no token sees a <mem>
        for i in range(count):
            mask[length + i, : (i + 1) * ratio] = True
            mask[length + i, length + i] = True
        states = []
        for i in range(self.num_layers):
            states.append(rows[length:])
            rows = self.layer(i, rows, positions, mask, ["write"] * len(rows))
        return states

    def decode(self, states: list[Tensor], embedded: Tensor) -> Tensor:
        """The decoder: tokens are the plain base behind keys and values that the transfer head makes of the states."""
        num_slots, tokens = len(states[0]), embedded
        length = num_slots + len(tokens)
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        heads = ["read"] * num_slots + [None] * len(tokens)
        for i in range(self.num_layers):
            rows = torch.cat([states[i], tokens])
            tokens = self.layer(i, rows, list(range(length)), mask, heads)[num_slots:]
        normed = self.rms_norm(tokens, self.weights["model.language_model.norm.weight"])
        return normed @ self.weights["lm_head.weight"].T

    def embed(self, ids: list[int]) -> Tensor:
        """Embeddings `[T, D]`."""
        return self.weights["model.language_model.embed_tokens.weight"][ids]

    def layer(self, i: int, rows: Tensor, positions: list[int], mask: Tensor, adapters: list[str | None]) -> Tensor:
        """Decoder layer i on rows `[T, D]`; `mask` `[T, T]` says what each sees, `adapters` which are on for it."""
        name = f"model.language_model.layers.{i}"
        normed = self.rms_norm(rows, self.weights[f"{name}.input_layernorm.weight"])
        rows = rows + self.attention(i, normed, positions, mask, adapters)
        normed = self.rms_norm(rows, self.weights[f"{name}.post_attention_layernorm.weight"])
        gate = self.linear(i, "mlp.gate_proj", normed, adapters)
        up = self.linear(i, "mlp.up_proj", normed, adapters)
        return rows + self.linear(i, "mlp.down_proj", gate * torch.sigmoid(gate) * up, adapters)

    def attention(self, i: int, rows: Tensor, positions: list[int], mask: Tensor, adapters: list[str | None]) -> Tensor:
        """Attention head by head and query by query; several query heads share a key and value head."""
        queries, keys, values = (self.linear(i, f"self_attn.{x}_proj", rows, adapters) for x in "qkv")
        width = queries.shape[1] // self.num_heads
        heads = []
        for head in range(self.num_heads):
            shared = head * self.num_kv_heads // self.num_heads
            query = self.rotate(queries[:, head * width : (head + 1) * width], positions)
            key = self.rotate(keys[:, shared * width : (shared + 1) * width], positions)
            value = values[:, shared * width : (shared + 1) * width]
            attended = []
            for t in range(len(rows)):
                scores = key[mask[t]] @ query[t] / width**0.5
                share = (scores - scores.max()).exp()
                attended.append(share / share.sum() @ value[mask[t]])
            heads.append(torch.stack(attended))
        return self.linear(i, "self_attn.o_proj", torch.cat(heads, 1), adapters)

    def linear(self, i: int, name: str, rows: Tensor, adapters: list[str | None]) -> Tensor:
        """A linear map of layer i, row by row with the row's adapter: `W x + scale * up (down x)`."""
        layer = f"model.language_model.layers.{i}"
        mapped = []
        for row, adapter in zip(rows, adapters, strict=True):
            result = self.weights[f"{layer}.{name}.weight"] @ row
            low_rank = f"{layer}.rcc.{adapter}.{name.replace('.', '_')}_adapter"
            if f"{low_rank}.up" in self.weights:
                update = self.weights[f"{low_rank}.up"] @ (self.weights[f"{low_rank}.down"] @ row)
                result = result + self.adapter_scale * update
            mapped.append(result)
        return torch.stack(mapped)

    def rms_norm(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Rows divided by their root mean square (in float32), times a weight for each feature."""
        single = rows.float()
        scaled = single * torch.rsqrt(single.pow(2).mean(1, keepdim=True) + self.norm_eps)
        return weight * scaled.double()

    def rotate(self, rows: Tensor, positions: list[int]) -> Tensor:
        """Rotary positions: features j and j + D/2 of the row at position t, turned by t * theta ** (-2j / D)."""
        width = rows.shape[1]
        frequencies = 1.0 / self.rope_theta ** (torch.arange(0, width, 2).float() / width)
        angles = torch.tensor(positions).float()[:, None] * frequencies
        cos, sin = angles.cos().double(), angles.sin().double()
        first, second = rows[:, : width // 2], rows[:, width // 2 :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], 1)
