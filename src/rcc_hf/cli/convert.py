# SPDX-License-Identifier: Apache-2.0
"""`rcc convert`: a base model becomes an RCC checkpoint."""

from dataclasses import dataclass, field

from rcc_hf.checkpoints import ensure_reconstruction_prompt
from rcc_hf.cli.loading import load
from rcc_hf.cli.settings import CompressorSettings, ModelSettings, parse


@dataclass(kw_only=True)
class ConvertSettings:
    """What is written."""

    adapter_only: bool = field(default=False, metadata={"help": "Write the compressor alone, without the base."})


def run(argv: list[str]) -> int:
    """Convert and save."""
    positionals = {"model": "id on the Hub, folder, or smollm2 (bundled)", "output": "folder to write"}
    compressor, how, what, names = parse(
        argv, "convert", "Put a fresh, untrained compressor on a base model.", positionals,
        CompressorSettings, ModelSettings, ConvertSettings,
    )  # fmt: skip
    model, tokenizer = load(names.model, how, compressor)
    ensure_reconstruction_prompt(model, tokenizer)
    model.save_pretrained(names.output, adapter_only=what.adapter_only)
    tokenizer.save_pretrained(names.output)
    print(f"wrote {names.output}: {model.config.text_config.model_type} base, scheme {model.config.scheme}")
    return 0
