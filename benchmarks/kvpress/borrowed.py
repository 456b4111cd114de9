# SPDX-License-Identifier: Apache-2.0
"""The parts of rcc_hf's evaluation that need no model of its own, for an environment whose transformers is too old.

Importing `rcc_hf` refuses such a transformers, since compressed memory would be wrong there. Examples, token ids,
budgets and folders do not depend on it: they are imported from the source tree as parts of a package whose `__init__`
does not run. Import this module before anything else of `rcc_hf`.
"""

import sys
from pathlib import Path
from types import ModuleType

_package = ModuleType("rcc_hf")
_package.__path__ = [str(Path(__file__).resolve().parents[2] / "src" / "rcc_hf")]
sys.modules.setdefault("rcc_hf", _package)

from rcc_hf.evaluation.encoding import TextEncoder  # noqa: E402
from rcc_hf.evaluation.examples import Example, read_examples  # noqa: E402
from rcc_hf.evaluation.methods_base import budget, entry_nbytes  # noqa: E402
from rcc_hf.evaluation.outputs import RunFolder  # noqa: E402

__all__ = ["Example", "RunFolder", "TextEncoder", "budget", "entry_nbytes", "read_examples"]
