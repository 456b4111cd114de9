# SPDX-License-Identifier: Apache-2.0
"""What importing rcc_hf changes in transformers: three registrations and nothing else."""

import os
import subprocess
import sys

import pytest
from checkpoints import Bases
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return Bases(tmp_path_factory.mktemp("bases"))


SIDE_EFFECTS = """\
import logging, os, sys, warnings
import torch, transformers
from transformers import AttentionInterface, AttentionMaskInterface, cache_utils, dynamic_module_utils
from transformers import generation, masking_utils, modeling_layers, modeling_utils
from transformers.models.auto import auto_factory, configuration_auto, modeling_auto

modules = [
    cache_utils, dynamic_module_utils, generation.utils, masking_utils, modeling_layers, modeling_utils, auto_factory,
    configuration_auto, modeling_auto, transformers.configuration_utils, torch.nn.Module, torch.utils.checkpoint,
    transformers.PreTrainedModel, transformers.PreTrainedConfig, transformers.GenerationMixin, cache_utils.Cache,
    cache_utils.DynamicLayer, transformers.models.llama.modeling_llama, transformers.LlamaForCausalLM,
]
registries = {
    name: value
    for name, value in vars(modeling_auto).items()
    if isinstance(value, auto_factory._LazyAutoMapping)
}
registries["configs"] = configuration_auto.CONFIG_MAPPING


def seen():
    return {
        "attributes": [{name: id(value) for name, value in vars(module).items()} for module in modules],
        "attention": [sorted(AttentionInterface()), sorted(AttentionMaskInterface())],
        "layers": [dict(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING), dict(cache_utils.STATIC_LAYER_TYPE_MAPPING)],
        "environment": dict(os.environ),
        "torch": [torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.initial_seed()],
        "logging": [list(logging.root.handlers), logging.root.level, logging.getLogger("transformers").level],
        "hooks": [sys.excepthook, sys.displayhook, list(warnings.filters)],
    }


def registered():
    return {(name, str(key)) for name, registry in registries.items() for key in registry._extra_content}


before, entries = seen(), registered()
import rcc_hf
after = seen()
assert before.keys() == after.keys()
for name in before:
    assert before[name] == after[name], name
assert registered() - entries == {
    ("configs", "rcc"),
    ("MODEL_MAPPING", str(rcc_hf.RCCConfig)),
    ("MODEL_FOR_CAUSAL_LM_MAPPING", str(rcc_hf.RCCConfig)),
}, registered() - entries
assert entries <= registered()
"""


def test_importing_the_package_changes_nothing_but_three_registrations(tmp_path):
    # not what this process has set already, maybe by importing rcc_hf
    environment = {name: os.environ[name] for name in ("HOME", "PATH", "PYTHONPATH") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-c", SIDE_EFFECTS], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""


def test_other_models_are_what_they_were(bases):
    """The Auto classes give everybody else's checkpoints the classes that they always gave."""
    assert type(AutoConfig.from_pretrained(bases())) is LlamaConfig
    assert type(AutoModelForCausalLM.from_pretrained(bases())) is LlamaForCausalLM
