# SPDX-License-Identifier: Apache-2.0
"""The bar: a base model without a compressor, and baselines at the memory budget of one, on every kind of task.

    python benchmarks/baselines.py FOLDER --qa QA.jsonl [--model smollm2] [--workers 4]

Runs `rcc evaluate` once per task, method and ratio, several at a time; runs that are done are left alone, so that a
killed call goes on. `FOLDER/<task>/<method>[-<ratio>]/` has the result of each, for `rcc plot FOLDER`; `--copy DIR`
puts the metrics alone there too. On many cores set OMP_NUM_THREADS=1: runs are bound by one core each.
"""

import argparse
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

UNBOUNDED = ("full", "none", "wrong")
BOUNDED = ("truncate-head", "truncate-tail", "window-sink", "mean-pool")
PROGRAM = "import sys; from rcc_hf.cli import main; sys.exit(main())"


def tasks(settings: argparse.Namespace) -> dict[str, list[str]]:
    """Arguments of `rcc evaluate` for every task."""
    segment = ["--segment_length", str(settings.segment_length)]
    needles = [*segment, "--lengths", "1024", "2048", "4096", "7680", "--num_examples", "4"]
    found = {
        "passkey": ["--task", "passkey", *needles, "--fillers", "repetitive", "words", "books"],
        "needles": ["--task", "needles", *needles, "--fillers", "books", "--key_types", "number", "uuid"],
        "ruler": ["--task", "ruler", *segment, "--lengths", "4096", "--num_examples", "25", "--chat"],
        "reconstruction": ["--task", "reconstruction", *segment, "--lengths", "512", "1024", "--num_examples", "32"],
        "perplexity": ["--task", "perplexity", *segment, "--lengths", "0", "512", "2048", "4096", "7680"],
        "cost": ["--task", "cost", *segment, "--lengths", "1024", "2048", "4096", "7680", "--batch_size", "1"],
    }
    if settings.qa:
        found["qa"] = ["--task", "qa", "--segment_length", "64", "--data", settings.qa, "--benchmark", "nq", "--chat"]
        found["qa"] += ["--num_examples", str(settings.num_questions)]
    return found


def runs(settings: argparse.Namespace) -> list[tuple[Path, list[str]]]:
    """Folder and command of every run."""
    found = []
    for task, arguments in tasks(settings).items():
        if settings.tasks and task not in settings.tasks:
            continue
        for method in (*UNBOUNDED, *BOUNDED):
            if task == "cost" and method == "wrong":
                continue
            for ratio in settings.ratio if method in BOUNDED else [None]:
                folder = settings.folder / task / (method if ratio is None else f"{method}-{ratio}")
                command = ["evaluate", settings.model, *arguments, "--method", method, "--output", str(folder)]
                command += ["--no_progress", "--dtype", settings.dtype]
                found.append((folder, command if ratio is None else [*command, "--ratio", str(ratio)]))
    return found


def run(folder: Path, command: list[str]) -> str:
    """One run, unless it is done; a line that says what came of it."""
    if not (folder / "metrics.json").exists():
        done = subprocess.run([sys.executable, "-c", PROGRAM, *command], capture_output=True, text=True)
        if done.returncode:
            return f"FAILED {folder}: {done.stderr.strip()[-300:]}"
    return f"{folder}: {(folder / 'metrics.json').stat().st_size} bytes"


def main() -> None:
    """Run, several at a time; cost alone, at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where runs are kept")
    parser.add_argument("--model", default="smollm2", help="base (default: smollm2)")
    parser.add_argument("--qa", help="questions with contexts, JSON lines (without: no task qa)")
    parser.add_argument("--num-questions", type=int, default=400, help="of these (default: 400)")
    parser.add_argument("--tasks", nargs="+", help="only these tasks")
    parser.add_argument("--ratio", type=int, nargs="+", default=[8, 32], help="source tokens per entry (default: 8 32)")
    parser.add_argument("--segment-length", type=int, default=512, help="whose memory sets the budget (default: 512)")
    parser.add_argument("--dtype", default="bfloat16", help="of the model (default: bfloat16)")
    parser.add_argument("--workers", type=int, default=4, help="runs at a time (default: 4)")
    parser.add_argument("--copy", type=Path, help="folder for the metrics alone")
    settings = parser.parse_args()
    every = runs(settings)
    for wanted, workers in ((False, settings.workers), (True, 1)):
        with ThreadPoolExecutor(workers) as pool:
            chosen = [one for one in every if ("cost" in one[0].parts) == wanted]
            for line in pool.map(lambda one: run(*one), chosen):
                sys.stdout.write(line + "\n")
                sys.stdout.flush()
    if settings.copy is not None:
        for file in settings.folder.rglob("metrics.json"):
            target = settings.copy / file.relative_to(settings.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)


if __name__ == "__main__":
    main()
