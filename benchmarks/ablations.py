# SPDX-License-Identifier: Apache-2.0
"""Ways to build a compressor, each trained for the same time on the same texts, and what they reconstruct then.

    python benchmarks/ablations.py FOLDER --texts SHARDS --held_out SHARDS [--minutes 1.5] [--gpus 4] [--variants add]

The variants stand in ablations.yaml. Each is a process of its own on one GPU (`ablation_variant.py`), several at a
time; those that are done are left alone, so that a killed call goes on. Time is that of steps: compiling, held-out
texts and saving do not count. Held-out texts are windows of the same documents for all variants, as many tokens at
every ratio; a window is a segment long, so variants of another segment length see other windows.

`FOLDER/<variant>/` has result.json, the checkpoint (model/) and the log of each; `FOLDER/ablations.json` all results,
and `FOLDER/ablations.md` the table, by token accuracy at the highest ratio.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from ablation_variant import JOB, RESULT
from gpus import environment, spread

from rcc_hf.modeling.schemes_rcc import SCHEMES, option_names
from rcc_hf.optional import import_optional
from rcc_hf.recipes import Recipe, merge
from rcc_hf.surroundings import surroundings
from rcc_hf.texts import read_documents

HERE = Path(__file__).parent
LOG, MODEL = "log.txt", "model"


def read_variants(file: Path, *, tiny: bool = False) -> tuple[dict[str, dict[str, Any]], list[int]]:
    """The recipes of all variants by name, not parsed yet, and the ratios at which they are measured.

    Raises:
        ValueError: a name is none of a folder, or a recipe is wrong.
    """
    data = yaml.safe_load(file.read_text(encoding="utf-8"))
    found = {}
    for name, changes in data["variants"].items():
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
            raise ValueError(f"{file}: {name!r} names a folder; write it in small letters, digits, . and -")
        recipe = merge(merge(for_scheme(data["common"], changes), changes), data["tiny"] if tiny else {})
        try:
            Recipe.parse(recipe)
        except ValueError as error:
            raise ValueError(f"{file}: {name}: {error}") from error
        found[name] = recipe
    return found, data["ratios"]


def for_scheme(common: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The common recipe for a variant of another scheme: without the options that this one does not have."""
    scheme = changes.get("compressor", {}).get("scheme")
    if scheme is None:
        return common
    others = {option for name in SCHEMES for option in option_names(name)} - set(option_names(scheme))
    kept = {name: value for name, value in common["compressor"].items() if name not in others}
    return {**common, "compressor": kept}


def jobs(settings: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What is to be done for each variant that was chosen, as job.json holds it.

    Raises:
        ValueError: a variant is unknown, or there are no texts.
        ModuleNotFoundError: BLEU-4, or its texts, need a package that is not installed.
    """
    if settings.bleu:  # or it would be missed after the first training
        import_optional("sacrebleu")
        next(iter(read_documents(settings.bleu_texts)))
    recipes, ratios = read_variants(settings.file, tiny=settings.tiny)
    unknown = [name for name in settings.variants or () if name not in recipes]
    if unknown:
        raise ValueError(f"there is no variant {', '.join(unknown)}; choose of {', '.join(recipes)}")
    names = ("model", "texts", "held_out")
    given = {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}
    measured = ("dtype", "trial_steps", "held_out_tokens", "bleu", "bleu_texts")
    how = {"seconds": 60 * settings.minutes, "ratios": ratios, **{name: getattr(settings, name) for name in measured}}
    found = {name: {**how, "recipe": {**recipes[name], **given}} for name in settings.variants or recipes}
    for name, job in found.items():
        missing = [field for field in ("texts", "held_out") if not job["recipe"].get(field)]
        if missing:
            raise ValueError(f"{name} has no {', '.join(missing)}; give --{' and --'.join(missing)}")
    return json.loads(json.dumps(found))  # as they are read again, with texts for keys


def run(folder: Path, job: Mapping[str, Any], gpu: int | None = None) -> dict[str, Any]:
    """One variant, unless it is done: its result, or an `error` in one line.

    Args:
        folder: Of the variant.
        job: What it is.
        gpu: The only one that it sees; None: as this process.
    """
    done = folder / RESULT
    if not done.exists():
        if (folder / JOB).exists():  # of a call that was killed
            shutil.rmtree(folder / MODEL, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / JOB).write_text(json.dumps(job, indent=2) + "\n", encoding="utf-8")
        with (folder / LOG).open("w", encoding="utf-8") as log:
            called = [sys.executable, str(HERE / "ablation_variant.py"), str(folder)]
            ran = subprocess.run(called, stdout=log, stderr=subprocess.STDOUT, env=environment(gpu))
        if ran.returncode:
            return {"error": f"{last_words(folder / LOG)} (status {ran.returncode}; see {folder / LOG})"}
    elif differing := differences(json.loads((folder / JOB).read_text(encoding="utf-8")), job):
        return {"error": f"it is done with other settings ({', '.join(differing)}); take another folder"}
    found = json.loads(done.read_text(encoding="utf-8"))
    return {"commit": found["commit"], "hardware": found["hardware"], **found["result"]}


def last_words(log: Path) -> str:
    """The last exception of a log, or its last line if there is none."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (raised or lines)[-1]


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """Where two jobs differ, by names such as `recipe.training.batch_size`."""
    if not isinstance(there, Mapping) or not isinstance(here, Mapping):
        return [] if there == here else [f"{name}: {there!r} there, {here!r} here"]
    names = sorted(there.keys() | here.keys())
    return [one for n in names for one in differences(there.get(n), here.get(n), f"{name}.{n}".lstrip("."))]


def run_all(
    chosen: Mapping[str, Mapping[str, Any]], folder: Path, workers: int, gpus: int
) -> dict[str, dict[str, Any]]:
    """The results of all variants by name; a line for each says what came of it."""

    def one(name: str, gpu: int | None) -> dict[str, Any]:
        found = run(folder / name, chosen[name], gpu)
        said = f"FAILED: {found['error']}" if "error" in found else f"{found['steps']} steps"
        sys.stdout.write(f"{name}: {said}\n")
        sys.stdout.flush()
        return found

    return dict(zip(chosen, spread(one, chosen, workers, gpus), strict=True))


def table(results: Mapping[str, Mapping[str, Any]], ratios: Sequence[int]) -> str:
    """The results in Markdown, the highest token accuracy at the highest ratio first, and errors at the end."""
    last = str(max(ratios))
    good = {name: row for name, row in results.items() if "error" not in row}
    order = sorted(good, key=lambda name: -good[name]["held_out"][last]["token_accuracy"])
    has_bleu = any("bleu4" in row["held_out"][last] for row in good.values())
    head = ["variant", "trained, M", "checkpoint, MB", "steps", "seconds", "source tokens, M", "tokens/s", "peak, GiB"]
    head += [f"accuracy {r}" for r in ratios] + [f"loss {r}" for r in ratios]
    head += [f"BLEU-4 {r}" for r in ratios] if has_bleu else []
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    rows += [[name, *cells(good[name], ratios, has_bleu)] for name in order]
    rows += [
        [name, row["error"].replace("|", "/"), *[""] * (len(head) - 2)]
        for name, row in results.items()
        if "error" in row
    ]
    widths = [max(len(row[i]) for row in rows if "error" not in results.get(row[0], ())) for i in range(len(head))]
    lines = [
        [f"{row[0]:{widths[0]}}", *(f"{cell:>{n}}" for cell, n in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cells(row: Mapping[str, Any], ratios: Sequence[int], has_bleu: bool) -> list[str]:
    """What the table says of a variant, behind its name."""
    peak, measured = row["peak_memory_gib"], [row["held_out"][str(ratio)] for ratio in ratios]
    return [
        f"{row['trained_parameters'] / 1e6:.2f}",
        f"{row['checkpoint_bytes_in_bf16'] / 1e6:.1f}",
        f"{row['steps']:,}",
        f"{row['seconds']:.1f}",
        f"{row['source_tokens'] / 1e6:.2f}",
        f"{row['source_tokens_per_second']:,.0f}",
        "" if peak is None else f"{peak:.1f}",
        *(f"{one['token_accuracy']:.4f}" for one in measured),
        *(f"{one['loss']:.3f}" for one in measured),
        *(f"{one['bleu4']:.4f}" for one in measured if has_bleu),
    ]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where results are kept")
    parser.add_argument("--file", type=Path, default=HERE / "ablations.yaml", help="variants (default: ablations.yaml)")
    parser.add_argument("--model", help="base, instead of the file's")
    parser.add_argument("--texts", nargs="+", help="sources of documents, or one folder of rcc tokenize")
    parser.add_argument("--held_out", nargs="+", help="the same, of what is not trained on")
    parser.add_argument("--variants", nargs="+", help="only these (default: all of the file)")
    parser.add_argument("--minutes", type=float, default=1.5, help="of training, for each (default: 1.5)")
    parser.add_argument("--gpus", type=int, default=0, help="spread over GPUs 0 to N-1 (default: one device)")
    parser.add_argument("--workers", type=int, help="variants at a time (default: one for each GPU)")
    parser.add_argument("--tiny", action="store_true", help="a trial run of smaller variants")
    parser.add_argument("--dtype", default="bfloat16", help="of the base (default: bfloat16)")
    parser.add_argument("--trial_steps", type=int, default=24, help="of each kind of batch, at first (default: 24)")
    parser.add_argument(
        "--held_out_tokens", type=int, default=131072, help="source tokens measured at each ratio (default: 131072)"
    )
    parser.add_argument("--bleu", type=int, default=0, help="passages written down freely at each ratio (default: 0)")
    parser.add_argument("--bleu_texts", default="prose-held-out", help="of which they are (default: prose-held-out)")
    settings = parser.parse_args(argv)
    for name, least in (("trial_steps", 2), ("gpus", 0), ("bleu", 0), ("held_out_tokens", 1)):
        if getattr(settings, name) < least:
            parser.error(f"--{name} {getattr(settings, name)} must be at least {least}")
    if settings.minutes <= 0:
        parser.error(f"--minutes {settings.minutes} must be above 0")
    if settings.workers is not None and settings.workers < 1:
        parser.error(f"--workers {settings.workers} must be at least 1")
    return settings


def main(argv: list[str] | None = None) -> int:
    """Run, several at a time; print and write the table. The status is 1 if a variant failed."""
    settings = parse(argv)
    chosen = jobs(settings)
    results = run_all(chosen, settings.folder, settings.workers or max(1, settings.gpus), settings.gpus)
    shown = table(results, next(iter(chosen.values()))["ratios"])
    report = {**surroundings("cuda" if torch.cuda.is_available() else "cpu"), "jobs": chosen, "results": results}
    (settings.folder / "ablations.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (settings.folder / "ablations.md").write_text(shown, encoding="utf-8")
    sys.stdout.write(shown)
    return 1 if any("error" in row for row in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
