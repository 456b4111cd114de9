# SPDX-License-Identifier: Apache-2.0
"""The bar: a base model without a compressor, and baselines at the memory budget of one, on every kind of task.

    python benchmarks/baselines.py FOLDER --qa QA.jsonl [--model smollm2] [--workers 4] [--gpus 2] [--scale 0.25]

Runs `rcc evaluate` once per task, method and ratio, several at a time, on as many GPUs as are given; runs that are done
are left alone, so that a killed call goes on. `FOLDER/<task>/<method>[-<ratio>]/` has the result of each, for
`rcc plot FOLDER`; `--copy DIR` puts the metrics alone there too. On many cores set OMP_NUM_THREADS=1: runs are bound by
one core each. How many examples there are is said by `--examples` and `--scale`: of each length and depth for pass keys
and needles, of each task for RULER, of each length for reconstruction; places for perplexity, runs for cost.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gpus import environment, spread

UNBOUNDED = ("full", "none", "wrong")
BOUNDED = ("truncate-head", "truncate-tail", "window-sink", "mean-pool")
EXAMPLES = {"passkey": 4, "needles": 4, "ruler": 25, "reconstruction": 32, "perplexity": 8, "qa": 400, "cost": 5}
COMMAND = "command.json"
PROGRAM = "import sys; from rcc_hf.cli import main; sys.exit(main())"


def num_examples(settings: argparse.Namespace) -> dict[str, int]:
    """Of every task how many there are, at least one; `scale` does not touch the runs of cost.

    Raises:
        ValueError: a task is unknown, or a number is none.
    """
    found = {
        task: count if task == "cost" else max(1, round(count * settings.scale)) for task, count in EXAMPLES.items()
    }
    for given in settings.examples:
        task, _, count = given.partition("=")
        if task not in EXAMPLES or not count.isdecimal() or not int(count):
            raise ValueError(f"--examples has {given!r}; write TASK=NUMBER, where TASK is of {', '.join(EXAMPLES)}")
        found[task] = int(count)
    return found


def tasks(settings: argparse.Namespace) -> dict[str, list[str]]:
    """Arguments of `rcc evaluate` for every task."""
    segment = ["--segment_length", str(settings.segment_length)]
    lengths = ["--lengths", "1024", "2048", "4096", "7680"]
    found = {
        "passkey": [*segment, *lengths, "--fillers", "repetitive", "words", "books"],
        "needles": [*segment, *lengths, "--fillers", "books", "--key_types", "number", "uuid"],
        "ruler": [*segment, "--lengths", "4096", "--chat"],
        "reconstruction": [*segment, "--lengths", "512", "1024"],
        "perplexity": [*segment, "--lengths", "0", "512", "2048", "4096", "7680"],
        "cost": [*segment, *lengths, "--batch_size", "1"],
    }
    if settings.qa:
        found["qa"] = [*segment, "--context_tokens", "2048", "--data", settings.qa, "--benchmark", "nq", "--chat"]
    counts = num_examples(settings)
    return {
        task: ["--task", task, "--num_examples", str(counts[task]), *arguments] for task, arguments in found.items()
    }


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


def run(folder: Path, command: list[str], gpu: int | None = None) -> str:
    """One run, unless it is done; a line that says what came of it.

    Args:
        folder: Of the run.
        command: Of `rcc`, without its name.
        gpu: The only one that the run sees; None: as this process.
    """
    done = folder / COMMAND
    if not done.exists():
        called = [sys.executable, "-c", PROGRAM, *command]
        ran = subprocess.run(called, capture_output=True, text=True, env=environment(gpu))
        if ran.returncode:
            return f"FAILED {folder}: {ran.stderr.strip()[-300:]}"
        done.write_text(json.dumps(command) + "\n", encoding="utf-8")
    elif (was := json.loads(done.read_text(encoding="utf-8"))) != command:
        differing = [f"{one!r} there, {other!r} here" for one, other in zip(was, command, strict=False) if one != other]
        return f"FAILED {folder}: it is done with other settings ({', '.join(differing)}); take another folder"
    return f"{folder}: {(folder / 'metrics.json').stat().st_size} bytes"


def run_all(chosen: Sequence[tuple[Path, list[str]]], workers: int, gpus: int) -> bool:
    """Run so many at a time, each on a GPU that has the fewest others, and say what came of them.

    Returns:
        Whether all went well.
    """
    went_well = True
    for line in spread(lambda one, gpu: run(*one, gpu), chosen, workers, gpus):
        went_well &= not line.startswith("FAILED")
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    return went_well


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where runs are kept")
    parser.add_argument("--model", default="smollm2", help="base (default: smollm2)")
    parser.add_argument("--qa", help="questions with contexts, JSON lines (without: no task qa)")
    parser.add_argument("--tasks", nargs="+", choices=EXAMPLES, help="only these tasks")
    defaults = " ".join(f"{task}={count}" for task, count in EXAMPLES.items())
    parser.add_argument(
        "--examples", nargs="+", default=[], metavar="TASK=NUMBER", help=f"instead of: {defaults}, each times scale"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="multiplies these numbers, but not cost's (default: 1)"
    )
    parser.add_argument("--ratio", type=int, nargs="+", default=[8, 32], help="source tokens per entry (default: 8 32)")
    parser.add_argument("--segment-length", type=int, default=512, help="whose memory sets the budget (default: 512)")
    parser.add_argument("--dtype", default="bfloat16", help="of the model (default: bfloat16)")
    parser.add_argument("--workers", type=int, default=4, help="runs at a time, over all GPUs (default: 4)")
    parser.add_argument(
        "--gpus", type=int, default=0, help="spread the workers over GPUs 0 to N-1 (default: one device)"
    )
    parser.add_argument("--copy", type=Path, help="folder for the metrics alone")
    return parser.parse_args(argv)


def main() -> int:
    """Run, several at a time; cost alone, at the end. The status is 1 if a run failed."""
    settings = parse()
    every, went_well = runs(settings), True
    for is_cost, workers in ((False, settings.workers), (True, 1)):
        went_well &= run_all([one for one in every if ("cost" in one[0].parts) == is_cost], workers, settings.gpus)
    if settings.copy is not None:
        for file in settings.folder.rglob("metrics.json"):
            target = settings.copy / file.relative_to(settings.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    return 0 if went_well else 1


if __name__ == "__main__":
    sys.exit(main())
