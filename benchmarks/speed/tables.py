# SPDX-License-Identifier: Apache-2.0
"""Markdown tables of a benchmark's JSON, from that alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rcc_hf.plotting.labels import bytes_text, tokens_text

Row = Mapping[str, Any]
Cell = Callable[[Row], str]

TITLES = {
    "short_prompt": "Short prompts, without memory",
    "compression": "Compression throughput",
    "first_token": "Time to first token",
    "memory": "Peak memory up to the first token",
    "decode": "Decoding behind a long context",
}
NOTES = {
    "short_prompt": "One step of `generate`, or its first token. used: the model has worked with a memory before.",
    "compression": (
        "Base: its plain forward over the same segments. Share: 2 operations for each parameter of the layers' linear "
        "maps and each token, of the ceiling; done: with adapters, slots and attention. First call: compiling included."
    ),
    "first_token": "Base: prefill of context and prompt. Ours: compression of the context, then the prompt behind it.",
    "memory": "Weights included; beside: without any weights. Kept: the base's KV cache, and our slots.",
    "decode": (
        "The base's cache holds random keys and values. static: compiled steps on a GPU. Peak: weights included. "
        "merged: read adapters in a second copy of the weights."
    ),
}
SIDES = {
    "base": "base",
    "rcc": "ours",
    "base_compiled": "base, compiled",
    "rcc_compiled": "ours, compiled",
    "rcc_fused": "ours, merged",
}
"""What tables call them."""
_NONE = {"status": "-"}


def side(row: Row, name: str) -> Mapping[str, Any]:
    """One side, of which there may be none."""
    return row["sides"].get(name, _NONE)


def value(name: str, field: str, text: Callable[[float], str]) -> Cell:
    """A cell of one side: its status where there is no value."""

    def cell(row: Row) -> str:
        found = side(row, name)
        if found["status"] != "ok":
            return found["status"]
        return "-" if found.get(field) is None else text(found[field])

    return cell


def key(name: str, text: Callable[[Any], str] = str) -> Cell:
    return lambda row: text(row["key"][name])


def speedup(row: Row, base: str = "base", ours: str = "rcc") -> float | None:
    """How many times as fast ours is; None where a side has no time."""
    times = [side(row, name).get("median_seconds") for name in (base, ours)]
    return times[0] / times[1] if times[0] and times[1] else None


def times_text(number: float | None) -> str:
    return "-" if number is None else f"{number:.2f}x"


def spread(name: str, scale: float = 1.0, unit: str = "s") -> Cell:
    """Median and, in brackets, quartiles."""

    def cell(row: Row) -> str:
        found = side(row, name)
        if found["status"] != "ok":
            return found["status"]
        low, high = (scale * seconds for seconds in found["quartiles_seconds"])
        chunk = f", prefill in chunks of {found['prefill_chunk_size']}" if "prefill_chunk_size" in found else ""
        around = f"{low:.4g} to {high:.4g}" if len(found["seconds"]) > 1 else "1 run"
        return f"{scale * found['median_seconds']:.4g} {unit} ({around}{chunk})"

    return cell


def percent(number: float) -> str:
    return f"{100 * number:.1f} %"


def slower(row: Row) -> str:
    """By how much ours is slower, in percent."""
    times = speedup(row)
    return "-" if times is None else f"{100 * (1 / times - 1):+.1f} %"


_SHAPE: dict[str, Cell] = {"shape": key("shape"), "attention": key("attention")}
_LENGTH: dict[str, Cell] = {**_SHAPE, "context": key("length", tokens_text)}
COLUMNS: dict[str, dict[str, Cell]] = {
    "short_prompt": {
        **_SHAPE,
        "prompt": key("prompt"),
        "cache": key("cache"),
        "measured": key("measured"),
        "state": key("state"),
        "base": spread("base", 1000, "ms"),
        "ours": spread("rcc", 1000, "ms"),
        "ours is slower by": slower,
    },
    "compression": {
        **_LENGTH,
        "tokens a call": key("batch_tokens", tokens_text),
        "base": value("base", "tokens_per_second", lambda n: f"{n:,.0f} tokens/s"),
        "ours": value("rcc", "tokens_per_second", lambda n: f"{n:,.0f} tokens/s"),
        "base, share": value("base", "ceiling_share", percent),
        "ours, share": value("rcc", "ceiling_share", percent),
        "ours, done": value("rcc", "ceiling_share_done", percent),
        "base, compiled": value("base_compiled", "tokens_per_second", lambda n: f"{n:,.0f} tokens/s"),
        "ours, compiled": value("rcc_compiled", "tokens_per_second", lambda n: f"{n:,.0f} tokens/s"),
        "base, compiled, share": value("base_compiled", "ceiling_share", percent),
        "ours, compiled, share": value("rcc_compiled", "ceiling_share", percent),
        "base, compiled, first call": value("base_compiled", "first_call_seconds", "{:.1f} s".format),
        "ours, compiled, first call": value("rcc_compiled", "first_call_seconds", "{:.1f} s".format),
    },
    "first_token": {
        **_LENGTH,
        "base": spread("base"),
        "ours": spread("rcc"),
        "ours is as fast": lambda row: times_text(speedup(row)),
        "base, compiled": spread("base_compiled"),
        "ours, compiled": spread("rcc_compiled"),
        "ours is as fast, both compiled": lambda row: times_text(speedup(row, "base_compiled", "rcc_compiled")),
        "ours, compiled, first call": value("rcc_compiled", "first_call_seconds", "{:.1f} s".format),
    },
    "memory": {
        **_LENGTH,
        "base": value("base", "peak_bytes", bytes_text),
        "ours": value("rcc", "peak_bytes", bytes_text),
        "base, beside": value("base", "peak_beside_weights_bytes", bytes_text),
        "ours, beside": value("rcc", "peak_beside_weights_bytes", bytes_text),
        "base, kept": lambda row: bytes_text(side(row, "base").get("kept_bytes", 0)),
        "ours, kept": value("rcc", "kept_bytes", bytes_text),
    },
    "decode": {
        **_LENGTH,
        "batch": key("batch"),
        "cache": key("cache"),
        "base": spread("base", 1000, "ms"),
        "ours": spread("rcc", 1000, "ms"),
        "ours is as fast": lambda row: times_text(speedup(row)),
        "base, all rows": value("base", "tokens_per_second", lambda n: f"{n:,.0f} tokens/s"),
        "ours, all rows": value("rcc", "tokens_per_second", lambda n: f"{n:,.0f} tokens/s"),
        "base, peak": value("base", "peak_bytes", bytes_text),
        "ours, peak": value("rcc", "peak_bytes", bytes_text),
        "ours, merged": spread("rcc_fused", 1000, "ms"),
        "ours, merged, is as fast": lambda row: times_text(speedup(row, "base", "rcc_fused")),
        "ours, merged, all rows": value("rcc_fused", "tokens_per_second", lambda n: f"{n:,.0f} tokens/s"),
        "ours, merged, peak": value("rcc_fused", "peak_bytes", bytes_text),
    },
}


def present(columns: Mapping[str, Cell], rows: Sequence[Row]) -> dict[str, Cell]:
    """The columns without those of sides that were not asked for."""
    asked = {name for row in rows for name in row["sides"]}
    words = {"compiled": "rcc_compiled", "merged": "rcc_fused"}
    return {n: c for n, c in columns.items() if all(w not in n or s in asked for w, s in words.items())}


def table(columns: Mapping[str, Cell], rows: Sequence[Row]) -> str:
    """One table."""
    lines = [list(columns), ["---"] * len(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fastest(rows: Sequence[Row], name: str) -> Row | None:
    """The row in which one side takes least time."""
    measured = [row for row in rows if side(row, name).get("median_seconds")]
    return min(measured, key=lambda row: side(row, name)["median_seconds"], default=None)


def best_rows(rows: Sequence[Row], part: str) -> Iterator[list[str]]:
    """Cells of `BEST`: each side with the attention and cache that are fastest for it."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["key"]["part"] == part:
            name = (row["key"]["shape"], row["key"]["length"], row["key"].get("batch", 1))
            groups.setdefault(name, []).append(row)
    for (shape, length, batch), group in groups.items():
        found = [fastest(group, name) for name in ("base", "rcc")]
        cells = [shape, tokens_text(length), str(batch)]
        for name, row in zip(("base", "rcc"), found, strict=True):
            how = "" if row is None else f", {row['key']['attention']} {row['key'].get('cache', '')}".rstrip()
            cells.append("-" if row is None else f"{side(row, name)['median_seconds']:.4g} s{how}")
        base, ours = found
        both = base is not None and ours is not None
        times = side(base, "base")["median_seconds"] / side(ours, "rcc")["median_seconds"] if both else None
        yield [*cells, times_text(times)]


BEST = ["shape", "context", "batch", "base at its fastest", "ours at its fastest", "ours is as fast"]


def reasons(rows: Sequence[Row]) -> list[str]:
    """What kept sides from being measured, each reason once."""
    found: dict[str, int] = {}
    for row in rows:
        for name, result in row["sides"].items():
            if result["status"] != "ok":
                text = f"{SIDES[name]}, {result['status']}: {result.get('reason', '')}"
                found[text] = found.get(text, 0) + 1
    return [f"- {text} ({count} {'row' if count == 1 else 'rows'})" for text, count in found.items()]


def about(data: Mapping[str, Any]) -> str:
    """Where the numbers come from."""
    setup, runs = data["setup"], data["runs"]
    used = [runs[index] for index in sorted({row["run"] for row in data["rows"]})]
    ceilings = ", ".join(
        dict.fromkeys(f"{run['ceiling_tflops']:.4g} ({run['ceiling_sustained_tflops']:.4g} sustained)" for run in used)
    )
    versions = dict.fromkeys(f"{name} {number}" for run in used for name, number in run["versions"].items())
    commits = dict.fromkeys(
        f"{(run['commit'] or 'unknown')[:12]}{' with changes' if run['uncommitted_changes'] else ''}" for run in used
    )
    text = (
        f"{setup['hardware']}, {setup['dtype']}, ratio {setup['ratio']}, segments of {setup['segment_length']} tokens, "
        f"prompts of {setup['prompt']} behind a context, {setup['new_tokens']} new tokens where steps are timed. "
        "Weights are random. Medians, quartiles in brackets; both sides took turns. Square matrix products: "
        f"{ceilings} TFLOP/s. {', '.join(versions)}; commit {', '.join(commits)}."
    )
    return f"SMALL run on a CPU: these numbers say nothing of a GPU. {text}" if setup["small"] else text


def markdown(data: Mapping[str, Any]) -> str:
    """All tables."""
    parts = [about(data)]
    for part, columns in COLUMNS.items():
        rows = [row for row in data["rows"] if row["key"]["part"] == part]
        if rows:
            parts += [f"### {TITLES[part]}", NOTES[part], table(present(columns, rows), rows)]
        if rows and part in ("first_token", "decode"):
            cells = list(best_rows(rows, part))
            indices: dict[str, Cell] = {name: lambda row, i=i: row["cells"][i] for i, name in enumerate(BEST)}
            parts += ["Each side with what is fastest for it:", table(indices, [{"cells": line} for line in cells])]
    if found := reasons(data["rows"]):
        parts += ["### Not measured", "\n".join(found)]
    return "\n\n".join(parts) + "\n"
