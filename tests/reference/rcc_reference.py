# SPDX-License-Identifier: Apache-2.0
"""RCC on a Llama base, written out as plainly and slowly as possible: the implementation is compared with it.

From weights to logits by tensor algebra and loops: one row of a batch at a time, every head and every query on its
own, no cache, no mask, no hook, nothing of transformers. Symbols are those of https://arxiv.org/abs/2406.06110,
section 3: the encoder's states of a segment at every r-th token become the decoder's slots, layer by layer.

`T` rows (tokens or slots), `D` width, `V` vocabulary, `M` slots. Everything is float64, but for two places where a
Llama of transformers computes in float32 whatever its dtype (root mean squares and rotary tables): the same is done
here, or those roundings would be all that a comparison sees.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NaiveRCC:
    """A Llama base with an RCC compressor.

    Attributes:
        weights: all parameters by name, as `RCCForCausalLM.named_parameters` gives them.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        norm_eps: epsilon of the root mean square.
        rope_theta: base of the rotary frequencies.
        segment_length: tokens that are encoded together.
        wiring: "replace" or "add".
        adapter_scale: factor on the update of every low-rank adapter.
    """

    weights: dict[str, Tensor]
    num_layers: int
    num_heads: int
    num_kv_heads: int
    norm_eps: float
    rope_theta: float
    segment_length: int
    wiring: str
    adapter_scale: float

    def logits(self, context: list[int], local: list[int], ratio: int) -> Tensor:
        """Logits `[T, V]` of the local tokens behind a context, of which what fills no segment stays raw."""
        states, tail = self.compress(context, ratio)
        embedded = self.weights["model.language_model.embed_tokens.weight"][tail + local]
        return self.decode(states, embedded)[-len(local) :]

    def compress(self, context: list[int], ratio: int) -> tuple[list[Tensor], list[int]]:
        """For each layer the states `[M, D]` of all segments, and the tokens behind the last segment."""
        encoded = []
        while len(context) >= self.segment_length:
            segment, context = context[: self.segment_length], context[self.segment_length :]
            encoded.append(self.encode(segment, ratio))
        return [torch.cat([states[i] for states in encoded]) for i in range(self.num_layers)], context

    def encode(self, segment: list[int], ratio: int) -> list[Tensor]:
        """The encoder: the input of every layer at the last token of each group of `ratio` tokens."""
        rows = self.weights["model.language_model.embed_tokens.weight"][segment]
        states = []
        for i in range(self.num_layers):
            states.append(torch.stack([rows[t] for t in range(len(segment)) if (t + 1) % ratio == 0]))
            rows = self.layer(i, rows, "write")
        return states

    def decode(self, states: list[Tensor], embedded: Tensor) -> Tensor:
        """The decoder: one causal pass over slots and tokens, in which the states of layer i enter layer i's slots."""
        num_slots, tokens = len(states[0]), embedded
        slots = torch.zeros_like(states[0])
        for i in range(self.num_layers):
            mapped = torch.stack([self.slot_map(i, state) for state in states[i]])
            if self.wiring == "add" and i > 0:
                slots = slots + mapped
            else:
                slots = mapped
            rows = self.layer(i, torch.cat([slots, tokens]), "read")
            slots, tokens = rows[:num_slots], rows[num_slots:]
        normed = self.rms_norm(tokens, self.weights["model.language_model.norm.weight"])
        return normed @ self.weights["lm_head.weight"].T

    def slot_map(self, i: int, state: Tensor) -> Tensor:
        """P_i: what of a state `[D]` enters layer i; "replace" keeps the state itself and adds a correction."""
        name = f"model.language_model.layers.{i}.rcc.slot_map"
        if f"{name}.weight" in self.weights:
            return self.weights[f"{name}.weight"] @ state
        mapped = self.weights[f"{name}.up"] @ (self.weights[f"{name}.down"] @ state)
        return state + mapped if self.wiring == "replace" else mapped

    def layer(self, i: int, rows: Tensor, adapter: str) -> Tensor:
        """Decoder layer i on rows `[T, D]` at positions 0..T-1, with its "write" or its "read" adapters."""
        name = f"model.language_model.layers.{i}"
        normed = self.rms_norm(rows, self.weights[f"{name}.input_layernorm.weight"])
        rows = rows + self.attention(i, normed, adapter)
        normed = self.rms_norm(rows, self.weights[f"{name}.post_attention_layernorm.weight"])
        gate = self.linear(i, "mlp.gate_proj", normed, adapter)
        up = self.linear(i, "mlp.up_proj", normed, adapter)
        return rows + self.linear(i, "mlp.down_proj", gate * torch.sigmoid(gate) * up, adapter)

    def attention(self, i: int, rows: Tensor, adapter: str) -> Tensor:
        """Causal attention, head by head and query by query; several query heads share a key and value head."""
        queries, keys, values = (self.linear(i, f"self_attn.{x}_proj", rows, adapter) for x in "qkv")
        width = queries.shape[1] // self.num_heads
        heads = []
        for head in range(self.num_heads):
            shared = head * self.num_kv_heads // self.num_heads
            query = self.rotate(queries[:, head * width : (head + 1) * width])
            key = self.rotate(keys[:, shared * width : (shared + 1) * width])
            value = values[:, shared * width : (shared + 1) * width]
            attended = []
            for t in range(len(rows)):
                scores = key[: t + 1] @ query[t] / width**0.5
                share = (scores - scores.max()).exp()
                attended.append(share / share.sum() @ value[: t + 1])
            heads.append(torch.stack(attended))
        return self.linear(i, "self_attn.o_proj", torch.cat(heads, 1), adapter)

    def linear(self, i: int, name: str, rows: Tensor, adapter: str) -> Tensor:
        """A linear map of layer i, plus its adapter: `W x + scale * up (down x)`."""
        layer = f"model.language_model.layers.{i}"
        mapped = rows @ self.weights[f"{layer}.{name}.weight"].T
        low_rank = f"{layer}.rcc.{adapter}.{name.replace('.', '_')}_adapter"
        if f"{low_rank}.up" not in self.weights:
            return mapped
        update = rows @ self.weights[f"{low_rank}.down"].T @ self.weights[f"{low_rank}.up"].T
        return mapped + self.adapter_scale * update

    def rms_norm(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Rows divided by their root mean square (in float32), times a weight for each feature."""
        single = rows.float()
        scaled = single * torch.rsqrt(single.pow(2).mean(1, keepdim=True) + self.norm_eps)
        return weight * scaled.double()

    def rotate(self, rows: Tensor) -> Tensor:
        """Rotary positions: features j and j + D/2 of the row at position t, turned by t * theta ** (-2j / D)."""
        length, width = rows.shape
        frequencies = 1.0 / self.rope_theta ** (torch.arange(0, width, 2).float() / width)
        angles = torch.arange(length).float()[:, None] * frequencies
        cos, sin = angles.cos().double(), angles.sin().double()
        first, second = rows[:, : width // 2], rows[:, width // 2 :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], 1)
