# SPDX-License-Identifier: Apache-2.0
"""How the demos print: headings, tables of names and values, and what a memory saves."""

from rcc_hf import RCCForCausalLM, RCCMemory
from rcc_hf.cli.loading import plain_kv_bytes

# So that tables below one another are aligned.
WIDTH = 26


def section(title: str) -> None:
    """Print a heading."""
    print(f"\n== {title}", flush=True)


def print_table(*rows: tuple[str, str]) -> None:
    """Print names and values in two columns."""
    width = max(WIDTH, *(len(name) for name, _ in rows))
    for name, value in rows:
        print(f"   {name:{width}}  {value}".rstrip(), flush=True)


def print_memory(model: RCCForCausalLM, memory: RCCMemory, ratio: int, num_tokens: int, seconds: float) -> None:
    """Print what compressing a text of so many tokens at a ratio cost and saves."""
    plain = plain_kv_bytes(model, num_tokens)
    print_table(
        ("source tokens", f"{num_tokens:,}"),
        ("memory slots", f"{memory.num_slots:,} (ratio {ratio}) and {memory.num_local} raw tokens"),
        ("bytes of memory", f"{memory.nbytes:,}"),
        ("bytes of a plain KV cache", f"{plain:,} ({plain / memory.nbytes:.1f} times as much)"),
        ("seconds", f"{seconds:.1f} ({num_tokens / seconds:,.0f} tokens/s)"),
    )
