# SPDX-License-Identifier: Apache-2.0
"""What a memory in int8 costs: logits behind it against those behind the same memory in bfloat16, on real text.

    python benchmarks/int8_memory.py OUTPUT.json [--help]

The compressor is fresh (nothing is trained), so the perplexities say nothing about compression; the differences between
them say what rounding the slots does. The last row of each wiring is the yardstick: the bfloat16 model against the
same model in float32, both with a memory of their own.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from rcc_hf import RCCForCausalLM
from rcc_hf.modeling.memory_rcc import WIRINGS
from rcc_hf.prose import load_prose
from rcc_hf.smollm import smollm2_path
from rcc_hf.surroundings import surroundings


@dataclass(frozen=True)
class Result:
    """One memory against another: bytes of both, and how far the logits `[T, V]` behind them are apart."""

    wiring: str
    compared: str
    bytes: int
    bytes_of_reference: int
    ratio_of_norms: float
    kl_nats_per_token: float
    top_1_agreement: float
    perplexity: float
    perplexity_of_reference: float


@torch.no_grad()
def logits_behind(model: RCCForCausalLM, memory, ids: Tensor) -> Tensor:
    """Logits `[T - 1, V]` for ids `[1, T]` behind a memory, in float64."""
    return model(ids[:, :-1], memory=memory).logits[0].double()


def compare(names: tuple[str, str], sizes: tuple[int, int], actual: Tensor, expected: Tensor, ids: Tensor) -> Result:
    """The measures, of logits `[T - 1, V]` for ids `[1, T]`."""
    log_p, log_q = expected.log_softmax(-1), actual.log_softmax(-1)
    loss_p, loss_q = (torch.nn.functional.nll_loss(x, ids[0, 1:]).item() for x in (log_p, log_q))
    return Result(
        *names,
        *sizes,
        ratio_of_norms=((actual - expected).norm() / expected.norm()).item(),
        kl_nats_per_token=(log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
        top_1_agreement=(actual.argmax(-1) == expected.argmax(-1)).double().mean().item(),
        perplexity=torch.tensor(loss_q).exp().item(),
        perplexity_of_reference=torch.tensor(loss_p).exp().item(),
    )


def measure(wiring: str, context: Tensor, ids: Tensor, settings: argparse.Namespace) -> list[Result]:
    """Both comparisons for one wiring."""
    torch.manual_seed(0)
    options = {"wiring": wiring, "ratio": settings.ratio, "segment_length": settings.segment_length}
    model = RCCForCausalLM.from_base(smollm2_path(), dtype=torch.bfloat16, **options).to(settings.device).eval()
    memory = model.compress(context)
    small = memory.to_int8()
    plain, rounded = logits_behind(model, memory, ids), logits_behind(model, small, ids)
    single = model.float()
    exact_memory = single.compress(context)
    exact = logits_behind(single, exact_memory, ids)
    return [
        compare((wiring, "int8 against bfloat16 memory"), (small.nbytes, memory.nbytes), rounded, plain, ids),
        compare((wiring, "bfloat16 against float32"), (memory.nbytes, exact_memory.nbytes), plain, exact, ids),
    ]


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON file to write")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of context (default: 2048)")
    parser.add_argument("--behind", type=int, default=256, help="tokens decoded behind it (default: 256)")
    parser.add_argument("--ratio", type=int, default=8, help="tokens per slot (default: 8)")
    parser.add_argument("--segment-length", type=int, default=1024, help="tokens per segment (default: 1024)")
    parser.add_argument("--device", default="cpu", help="where to compute (default: cpu)")
    settings = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    text = load_prose("held_out")[0].text[: 12 * (settings.tokens + settings.behind)]
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"].to(settings.device)
    context, ids = ids[:, : settings.tokens], ids[:, settings.tokens : settings.tokens + settings.behind + 1]
    results = [result for wiring in WIRINGS for result in measure(wiring, context, ids, settings)]
    head = (
        f"{'wiring':8} {'compared':29} {'bytes':>10} {'of':>10} {'norms':>8} {'KL':>9} {'top 1':>6} {'perplexity':>18}"
    )
    lines = [
        f"{r.wiring:8} {r.compared:29} {r.bytes:10,} {r.bytes_of_reference:10,} {r.ratio_of_norms:8.5f} "
        f"{r.kl_nats_per_token:9.6f} {r.top_1_agreement:6.3f} {r.perplexity:8.3f} ({r.perplexity_of_reference:.3f})"
        for r in results
    ]
    sys.stdout.write("\n".join([head, *lines]) + "\n")
    report = {**surroundings(settings.device), "results": [asdict(result) for result in results]}
    settings.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
