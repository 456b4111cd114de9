# SPDX-License-Identifier: Apache-2.0
"""A user's process: transformers is installed, rcc_hf is not. Loads checkpoints with the code inside them.

Run as `python -I remote_user.py FOLDER`. FOLDER holds what tests/test_remote_code.py put there; the results go to its
sub-folder `results`.
"""

import importlib
import json
import sys
from pathlib import Path

ABSENT = ("rcc_hf", "modeling")


class Absent:
    """Makes packages that may be installed in this environment impossible to import."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline  # noqa: E402


def is_importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return False
    return True


def origin(thing) -> str:
    return f"{type(thing).__module__.split('.')[0]}:{type(thing).__name__}"


def code_of(model):
    """The module of the checkpoint that the model's class comes from."""
    return sys.modules[type(model).__module__]


@torch.no_grad()
def run(model, inputs, results, name) -> None:
    """Everything that a model computes, under names that begin with `name`."""
    model.eval()
    memory = model.compress(inputs["context"])
    outputs = {"plain": model(inputs["prompt"]), "memory": model(inputs["prompt"], memory=memory)}
    for kind, output in outputs.items():
        results[f"{name}.{kind}"] = output.logits if hasattr(output, "logits") else output.last_hidden_state
    for i, layer in enumerate(memory.layers):
        for j, tensor in enumerate(layer):
            results[f"{name}.slots.{i}.{j}"] = tensor
    if model.can_generate():
        settings = {"do_sample": False, "max_new_tokens": 8}
        results[f"{name}.generated"] = model.generate(inputs["prompt"], memory=memory, **settings)
        results[f"{name}.generated_long"] = model.generate(inputs["long"], **settings)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    target = folder / "results"
    inputs, results = load_file(folder / "inputs.safetensors"), {}
    facts = {"transformers": transformers.__version__, "importable": [name for name in ABSENT if is_importable(name)]}
    trust = {"trust_remote_code": True}
    full, adapter, hub = folder / "full", folder / "adapter", {"cache_dir": folder / "cache"}

    config = AutoConfig.from_pretrained(full, **trust)
    facts["config"] = [origin(config), origin(config.text_config), config.segment_length]
    try:
        AutoModelForCausalLM.from_pretrained(full, trust_remote_code=False)
    except ValueError as error:
        facts["untrusted"] = str(error)

    models = {
        "full": AutoModelForCausalLM.from_pretrained(full, **trust),
        "adapter": AutoModelForCausalLM.from_pretrained(adapter, **trust),
        "backbone": AutoModel.from_pretrained(full, **trust),
        "backbone_adapter": AutoModel.from_pretrained(adapter, base_model=folder / "base", **trust),
        "hub_full": AutoModelForCausalLM.from_pretrained("someone/full", **hub, **trust),
        "hub_adapter": AutoModelForCausalLM.from_pretrained("someone/adapter", **hub, **trust),
    }
    for name, model in models.items():
        run(model, inputs, results, name)
    facts["models"] = {name: origin(model) for name, model in models.items()}
    facts["modules"] = len({type(model).__module__ for model in models.values()})

    # a memory of the process that wrote the checkpoint, and one of another copy of the code
    memory = code_of(models["full"]).RCCMemory.from_pretrained(folder / "memory")
    foreign = models["adapter"].compress(inputs["context"])
    with torch.no_grad():
        results["full.given_memory"] = models["full"](inputs["prompt"], memory=memory).logits
        results["full.foreign_memory"] = models["full"](inputs["prompt"], memory=foreign).logits
    foreign.save_pretrained(target / "memory")

    facts["tokenizer"] = AutoTokenizer.from_pretrained(full, **trust).pad_token
    generator = pipeline("text-generation", model=str(full), **trust)
    settings = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    facts["text"] = generator(json.loads((folder / "text.json").read_text()), **settings)
    facts["pipeline"] = origin(generator.model)

    models["full"].save_pretrained(target / "full")
    models["adapter"].save_pretrained(target / "full of adapter")
    models["adapter"].save_pretrained(target / "adapter", adapter_only=True)
    models["backbone"].save_pretrained(target / "backbone")
    config.save_pretrained(target / "config")
    again = AutoModelForCausalLM.from_pretrained(target / "full", **trust)
    run(again, inputs, results, "again")
    fresh = type(models["full"]).from_base(folder / "base", segment_length=16, ratio=4, window=32)
    fresh.save_pretrained(target / "fresh")

    save_file({name: tensor.contiguous() for name, tensor in results.items()}, target / "results.safetensors")
    facts["importable"] += [name for name in sys.modules if name.split(".")[0] in ABSENT]
    (target / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
