# SPDX-License-Identifier: Apache-2.0
"""`rcc train`: the compressor of a checkpoint, or a fresh one on a base, learns to reconstruct text, or what a recipe
says."""

from dataclasses import dataclass, field

from torch.utils.data import Subset
from transformers import PreTrainedTokenizerBase, set_seed

from rcc_hf.checkpoints import ensure_reconstruction_prompt
from rcc_hf.cli import train_recipe
from rcc_hf.cli.loading import load
from rcc_hf.cli.settings import CompressorSettings, ModelSettings, parse
from rcc_hf.texts import read_documents
from rcc_hf.texts.blocks import TokenBlocks
from rcc_hf.training import METRICS, QualitySettings, TrainSettings, quality_callbacks, train

_PURPOSE = (
    "Train a compressor to reconstruct text, or as a recipe says; the base is frozen. What the numbers in the log "
    "mean: rcc train --help-metrics. The flags of recipes: rcc train RECIPE.yaml --help."
)


@dataclass(kw_only=True)
class DataSettings:
    """What it learns from."""

    data: str = field(
        default="prose",
        metadata={
            "help": "prose (bundled books), a .txt, .md, .jsonl or .parquet file, a folder of them, or datasets:NAME."
        },
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
    if train_recipe.is_recipe(argv):
        _print(train_recipe.run(argv))
        return 0
    positionals = {"model": "recipe (.yaml), or RCC checkpoint, or a base: id on the Hub, folder, or smollm2 (bundled)"}
    compressor, how, texts, quality, settings, names = parse(
        argv, "train", _PURPOSE, positionals,
        CompressorSettings, ModelSettings, DataSettings, QualitySettings, TrainSettings,
    )  # fmt: skip
    set_seed(settings.seed)
    model, tokenizer = load(names.model, how, compressor)
    prompt_ids = ensure_reconstruction_prompt(model, tokenizer)
    length = model.config.segment_length * texts.context_segments
    dataset = _blocks(texts.data, tokenizer, length, prompt_ids)
    held_out = None
    if texts.eval_data is not None:
        blocks = _blocks(texts.eval_data, tokenizer, length, prompt_ids)
        held_out = Subset(blocks, range(0, len(blocks), max(1, len(blocks) // texts.eval_contexts)))
    callbacks = quality_callbacks(model, tokenizer, quality, prompt_ids)
    metrics = train(model, settings, dataset, held_out, tokenizer, callbacks)
    _print(metrics)
    print(f"wrote {settings.output}")
    return 0


def _print(metrics: dict[str, float]) -> None:
    for name, value in metrics.items():
        print(f"{name:28} {value:.4f}" if isinstance(value, float) else f"{name:28} {value}")


def _blocks(source: str, tokenizer: PreTrainedTokenizerBase, length: int, prompt_ids: list[int]) -> TokenBlocks:
    return TokenBlocks((document.text for document in read_documents(source)), tokenizer, length, prompt_ids)
