# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in the hands of a user who has transformers alone, of this version and (`--other-python`) of another."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub_cache import put_into_cache
from safetensors.torch import load_file, save_file
from tiny import RATIO, SEGMENT, WINDOW, base_model, move_from_identity, ratio_of_norms, tokenizer, tokens, words
from transformers import AutoModel, AutoModelForCausalLM

from rcc_hf import RCCForCausalLM, RCCMemory, RCCModel

CHILD = Path(__file__).parent / "remote_user.py"
MODELING = Path(__file__).parent.parent / "modeling"
CODE = {path.name for path in MODELING.glob("*.py")} - {"__init__.py"}
AUTO_MAP = {
    "AutoConfig": "configuration_rcc.RCCConfig",
    "AutoModel": "modeling_rcc.RCCModel",
    "AutoModelForCausalLM": "modeling_rcc.RCCForCausalLM",
}


def set_the_scene(folder: Path) -> RCCForCausalLM:
    """Writes all that the user's process is given."""
    base_model().save_pretrained(folder / "base")
    model = RCCForCausalLM.from_base(
        folder / "base", segment_length=SEGMENT, ratio=RATIO, window=WINDOW, write_rank=4, read_rank=4, map_rank=4
    ).eval()
    model.generation_config.eos_token_id = None
    move_from_identity(model)
    model.save_pretrained(folder / "full")
    model.save_pretrained(folder / "adapter", adapter_only=True)
    tokenizer().save_pretrained(folder / "full")
    put_into_cache(folder / "cache", "someone/full", folder / "full")
    put_into_cache(folder / "cache", "someone/adapter", folder / "adapter")
    inputs = {"context": tokens(2, 54), "prompt": tokens(2, 7, seed=1), "long": tokens(2, 61, seed=2)}
    save_file(inputs, folder / "inputs.safetensors")
    model.compress(inputs["context"]).save_pretrained(folder / "memory")
    (folder / "text.json").write_text(json.dumps(words(inputs["long"][0])))
    (folder / "results").mkdir()
    return model


def visit(python: str, folder: Path) -> None:
    """Runs the user's process far from the tree, with a cache of its own for the code of checkpoints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["HF_MODULES_CACHE"] = str(folder / "modules")
    done = subprocess.run(
        [python, "-I", CHILD, folder], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        pytest.fail(f"the user's process failed:\n{done.stderr[-2000:]}", pytrace=False)


@pytest.fixture(scope="module", params=["this python", "other python"])
def user(request, tmp_path_factory):
    """What a process without rcc_hf found and computed, beside what is expected."""
    other = request.config.getoption("--other-python")
    if request.param == "other python" and other is None:
        pytest.skip("needs --other-python PATH, an interpreter with another version of transformers")
    folder = tmp_path_factory.mktemp("user")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in the same order as over there
    model = set_the_scene(folder)
    visit(sys.executable if request.param == "this python" else other, folder)
    yield SimpleNamespace(
        folder=folder,
        model=model,
        exact=request.param == "this python",
        inputs=load_file(folder / "inputs.safetensors"),
        results=load_file(folder / "results" / "results.safetensors"),
        facts=json.loads((folder / "results" / "facts.json").read_text()),
    )
    torch.set_num_threads(threads)


def assert_same(user, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to the last bit, or across versions of transformers nearly so."""
    if user.exact or not expected.is_floating_point():
        assert torch.equal(actual, expected)
    else:
        assert ratio_of_norms(actual, expected) <= 1e-5


@torch.no_grad()
def expectations(user) -> dict[str, torch.Tensor]:
    """What the process that wrote the checkpoint computes itself."""
    model, inputs, settings = user.model, user.inputs, {"do_sample": False, "max_new_tokens": 8}
    memory = model.compress(inputs["context"])
    slots = {f"slots.{i}.{j}": t for i, layer in enumerate(memory.layers) for j, t in enumerate(layer)}
    return slots | {
        "plain": model(inputs["prompt"]).logits,
        "memory": model(inputs["prompt"], memory=memory).logits,
        "generated": model.generate(inputs["prompt"], memory=memory, **settings),
        "generated_long": model.generate(inputs["long"], **settings),
    }


def test_rcc_hf_is_out_of_reach(user):
    assert user.facts["importable"] == []
    assert user.exact == (user.facts["transformers"] == __import__("transformers").__version__)


def test_classes_come_from_the_checkpoint(user):
    assert user.facts["config"] == ["transformers_modules:RCCConfig", "transformers:LlamaConfig", SEGMENT]
    assert user.facts["models"] == {
        "full": "transformers_modules:RCCForCausalLM",
        "adapter": "transformers_modules:RCCForCausalLM",
        "backbone": "transformers_modules:RCCModel",
        "backbone_adapter": "transformers_modules:RCCModel",
        "hub_full": "transformers_modules:RCCForCausalLM",
        "hub_adapter": "transformers_modules:RCCForCausalLM",
    }
    assert user.facts["modules"] == 4  # one copy of the code for each folder, side by side
    assert user.facts["pipeline"] == "transformers_modules:RCCForCausalLM"


def test_nothing_runs_untrusted(user):
    assert "trust_remote_code=True" in user.facts["untrusted"]


@pytest.mark.parametrize("name", ["full", "adapter", "hub_full", "hub_adapter", "again"])
def test_causal_models_compute_the_same(user, name):
    expected = expectations(user)
    found = {k.removeprefix(f"{name}."): t for k, t in user.results.items() if k.startswith(f"{name}.")}
    assert expected.keys() <= found.keys()
    for kind, tensor in expected.items():
        assert_same(user, found[kind], tensor)


@pytest.mark.parametrize("name", ["backbone", "backbone_adapter"])
def test_backbones_compute_the_same(user, name):
    model, inputs = user.model.model, user.inputs
    with torch.no_grad():
        memory = model.compress(inputs["context"])
        assert_same(user, user.results[f"{name}.plain"], model(inputs["prompt"])[0])
        assert_same(user, user.results[f"{name}.memory"], model(inputs["prompt"], memory=memory)[0])


def test_memories_pass_between_processes_and_copies_of_the_code(user):
    with torch.no_grad():
        memory = user.model.compress(user.inputs["context"])
        expected = user.model(user.inputs["prompt"], memory=memory).logits
        assert_same(user, user.results["full.given_memory"], expected)
        assert_same(user, user.results["full.foreign_memory"], expected)
        back = RCCMemory.from_pretrained(user.folder / "results" / "memory")
        assert_same(user, user.model(user.inputs["prompt"], memory=back).logits, expected)


def test_pipeline_and_tokenizer(user):
    assert user.facts["tokenizer"] == "<pad>"
    long = user.inputs["long"][:1]
    expected = user.model.generate(long, do_sample=False, max_new_tokens=8)
    assert user.facts["text"] == [{"generated_text": words(expected[0, long.shape[1] :])}]


@pytest.mark.parametrize("name", ["full", "full of adapter", "adapter"])
def test_what_the_user_saves_loads_here(user, name):
    folder, memory = user.folder / "results" / name, user.model.compress(user.inputs["context"])
    for load in (AutoModelForCausalLM, RCCForCausalLM):
        model = load.from_pretrained(folder).eval()
        assert type(model) is RCCForCausalLM
        for parameter, expected in zip(model.parameters(), user.model.parameters(), strict=True):
            assert torch.equal(parameter, expected)
        with torch.no_grad():
            assert torch.equal(
                model(user.inputs["prompt"], memory=model.compress(user.inputs["context"])).logits,
                user.model(user.inputs["prompt"], memory=memory).logits,
            )


def test_a_backbone_that_the_user_saves_loads_here(user):
    model = AutoModel.from_pretrained(user.folder / "results" / "backbone").eval()
    assert type(model) is RCCModel
    with torch.no_grad():
        assert torch.equal(model(user.inputs["prompt"])[0], user.model.model(user.inputs["prompt"])[0])


def test_the_user_makes_checkpoints_of_their_own(user):
    model = RCCForCausalLM.from_pretrained(user.folder / "results" / "fresh").eval()
    with torch.no_grad():
        assert torch.equal(model(user.inputs["prompt"]).logits, user.model(user.inputs["prompt"]).logits)


@pytest.mark.parametrize(
    "name", ["full", "adapter", *(f"results/{n}" for n in ("full", "full of adapter", "adapter", "backbone", "fresh"))]
)
def test_all_code_is_in_the_folder(user, name):
    """Word for word, all of it, for all three Auto classes, and without the package that it came from."""
    folder = user.folder / name
    assert {path.name for path in folder.glob("*.py")} == CODE
    for path in folder.glob("*.py"):
        assert path.read_text() == (MODELING / path.name).read_text()
        assert "import rcc_hf" not in path.read_text()
        assert "from rcc_hf" not in path.read_text()
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
