# SPDX-License-Identifier: Apache-2.0
"""`rcc train`: the compressor of a checkpoint, or a fresh one on a base, learns to reconstruct text."""

from dataclasses import dataclass, field

from torch.utils.data import Subset
from transformers import TrainerCallback, set_seed

from rcc_hf.checkpoints import ensure_reconstruction_prompt
from rcc_hf.cli.loading import load
from rcc_hf.cli.settings import CompressorSettings, ModelSettings, parse
from rcc_hf.data import TokenBlocks, read_documents
from rcc_hf.training import METRICS, Quality, QualitySettings, TrainSettings, make_probes, train

_PURPOSE = (
    "Train a compressor to reconstruct text; the base is frozen. What the numbers in the log mean: rcc train "
    "--help-metrics."
)


@dataclass(kw_only=True)
class DataSettings:
    """What it learns from."""

    data: str = field(
        default="prose", metadata={"help": "prose (bundled books), a .txt, .md or .jsonl file, or a folder of them."}
    )
    eval_data: str | None = field(
        default=None, metadata={"help": "Held-out text, as data; for example prose-held-out. Default: none."}
    )
    eval_contexts: int = field(
        default=64, metadata={"help": "Contexts of the held-out text that are used, spread out."}
    )
    context_segments: int = field(default=1, metadata={"help": "Segments per context."})


def run(argv: list[str]) -> int:
    """Train and save; or say what the numbers in the log mean."""
    if "--help-metrics" in argv:
        print("\n".join(f"{name}\n    {meaning}" for name, meaning in METRICS.items()))
        return 0
    positionals = {"model": "RCC checkpoint, or a base: id on the Hub, folder, or smollm2 (bundled)"}
    compressor, how, texts, quality, settings, names = parse(
        argv, "train", _PURPOSE, positionals,
        CompressorSettings, ModelSettings, DataSettings, QualitySettings, TrainSettings,
    )  # fmt: skip
    set_seed(settings.seed)
    model, tokenizer = load(names.model, how, compressor)
    prompt_ids = ensure_reconstruction_prompt(model, tokenizer)
    length = model.config.segment_length * texts.context_segments
    dataset = TokenBlocks(read_documents(texts.data), tokenizer, length, prompt_ids)
    held_out = None
    if texts.eval_data is not None:
        blocks = TokenBlocks(read_documents(texts.eval_data), tokenizer, length, prompt_ids)
        held_out = Subset(blocks, range(0, len(blocks), max(1, len(blocks) // texts.eval_contexts)))
    callbacks: list[TrainerCallback] = []
    if probes := make_probes(model, tokenizer, quality, prompt_ids):
        ratios = quality.quality_ratios or [model.config.ratio]
        callbacks.append(Quality(probes, tokenizer, ratios=ratios, steps=quality.quality_steps))
    metrics = train(model, settings, dataset, held_out, tokenizer, callbacks)
    for name, value in metrics.items():
        print(f"{name:28} {value:.4f}" if isinstance(value, float) else f"{name:28} {value}")
    print(f"wrote {settings.output}")
    return 0
