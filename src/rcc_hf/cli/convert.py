# SPDX-License-Identifier: Apache-2.0
"""`rcc convert`: a base model becomes an RCC checkpoint, and adapters become a LoRA of PEFT and back."""

from dataclasses import dataclass, field

from rcc_hf.checkpoints import ensure_reconstruction_prompt
from rcc_hf.cli.loading import load
from rcc_hf.cli.settings import CompressorSettings, ModelSettings, parse
from rcc_hf.lora import Part, from_peft_lora, to_peft_lora


@dataclass(kw_only=True)
class ConvertSettings:
    """What is written."""

    adapter_only: bool = field(default=False, metadata={"help": "Write the compressor alone, without the base."})
    read_lora: str | None = field(
        default=None, metadata={"help": "LoRA of PEFT, id or folder, as which the read adapters begin."}
    )
    write_lora: str | None = field(
        default=None, metadata={"help": "LoRA of PEFT, id or folder, as which the write adapters begin."}
    )
    to_peft: Part | None = field(
        default=None,
        metadata={
            "help": "Write these adapters of an RCC checkpoint as a LoRA of PEFT for the base, and nothing else."
        },
    )

    def __post_init__(self) -> None:
        if self.to_peft and (self.adapter_only or self.read_lora or self.write_lora):
            raise ValueError("--to_peft writes a LoRA and no checkpoint; give it alone")


def run(argv: list[str]) -> int:
    """Convert and save."""
    positionals = {"model": "id on the Hub, folder, or smollm2 (bundled)", "output": "folder to write"}
    compressor, how, what, names = parse(
        argv, "convert", "Put a fresh, untrained compressor on a base model.", positionals,
        CompressorSettings, ModelSettings, ConvertSettings,
    )  # fmt: skip
    model, tokenizer = load(names.model, how, compressor)
    if what.to_peft:
        to_peft_lora(model, names.output, part=what.to_peft)
        print(f"wrote {names.output}: the {what.to_peft} adapters, as a LoRA of PEFT")
        return 0
    if what.read_lora:
        from_peft_lora(model, what.read_lora, part="read")
    if what.write_lora:
        from_peft_lora(model, what.write_lora, part="write")
    ensure_reconstruction_prompt(model, tokenizer)
    model.save_pretrained(names.output, adapter_only=what.adapter_only)
    tokenizer.save_pretrained(names.output)
    print(f"wrote {names.output}: {model.config.text_config.model_type} base, scheme {model.config.scheme}")
    return 0
