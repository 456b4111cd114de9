# SPDX-License-Identifier: Apache-2.0
"""What source files must look like so that modeling/ works from inside a checkpoint, by rules over their text.

transformers copies the files of a checkpoint one by one: it finds them by a regular expression over their lines, and
the packages they need by their syntax tree. Each rule takes the text of a file and returns what is wrong with it.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_imports

ROOT = Path(__file__).parent.parent
MODELING = sorted((ROOT / "modeling").glob("*.py"))
SOURCE = sorted((ROOT / "src").rglob("*.py"))
OTHERS = [path for folder in ("tests", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]

# transformers itself requires the last two.
ALLOWED = {"torch", "transformers", "safetensors", "huggingface_hub"}
MAX_LINES = 300
# `import .name` is no Python, but the loader looks for it too.
LOADER_IMPORT = re.compile(r"^\s*(?:(from)\s+\.(\S+)\s+import|(import)\s+\.(\S+)\s*$)", re.MULTILINE)


def nested_relative_imports(source: str) -> list[str]:
    """Allows `from .name import x` only: the loader neither sees `from . import x` nor follows folders."""
    return [
        f"line {node.lineno}: `{ast.unparse(node)}`; only `from .name import x` reaches a checkpoint"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.level and (node.level > 1 or not node.module or "." in node.module)
    ]


def imports_beyond_requirements(source: str) -> list[str]:
    """Allows the standard library and what transformers requires, at any depth, and anything in a `try`."""
    return [
        f"line {line}: imports `{name}`, which every user of a checkpoint would then need; wrap it in `try`"
        for line, name in absolute_imports(ast.parse(source), into_try=False)
        if name.split(".")[0] not in ALLOWED | sys.stdlib_module_names
    ]


def imports_of_rcc_hf(source: str) -> list[str]:
    """Forbids rcc_hf even in a `try`: a checkpoint behaves the same whether or not the package is installed."""
    return [
        f"line {line}: imports `{name}`; modeling/ is complete by itself"
        for line, name in absolute_imports(ast.parse(source), into_try=True)
        if name.split(".")[0] == "rcc_hf"
    ]


def imports_of_the_folder(source: str) -> list[str]:
    """Forbids the top-level name `modeling`: it would load a second copy of every class."""
    return [
        f"line {line}: imports `{name}`; say rcc_hf.modeling"
        for line, name in absolute_imports(ast.parse(source), into_try=True)
        if name.split(".")[0] == "modeling"
    ]


def differences_from_the_loader(source: str) -> list[str]:
    """Wants each relative import on a line of its own, and no line of a string that reads like one."""
    real = {
        (node.lineno, node.module)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
    }
    seen = set()
    for match in LOADER_IMPORT.finditer(source):
        keyword, name = (1, 2) if match[1] else (3, 4)
        seen.add((source.count("\n", 0, match.start(keyword)) + 1, match[name]))
    return [
        f"line {line}: the loader takes this text for an import of `.{name}`" for line, name in sorted(seen - real)
    ] + [
        f"line {line}: the loader does not see this import of `.{name}`; give it a line"
        for line, name in sorted(real - seen)
    ]


def auto_class_registrations(source: str) -> list[str]:
    """Forbids `AutoX.register(...)`: the class of the first checkpoint would capture every later one of the process."""
    tree = ast.parse(source)
    imported = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "register":
            owner = ast.unparse(node.value).rsplit(".", 1)[-1]
            if imported.get(owner, owner).startswith("Auto"):
                found.append(f"line {node.lineno}: `{ast.unparse(node)}`; rcc_hf/__init__.py registers")
    return found


def missing_licence(source: str) -> list[str]:
    """Wants the licence on the first line."""
    line = "# SPDX-License-Identifier: Apache-2.0"
    return [] if source.startswith(line + "\n") else [f"line 1: is not `{line}`"]


def excess_length(source: str) -> list[str]:
    """Wants a file that can be read at one go."""
    lines = source.count("\n")
    return [f"line {lines}: the file ends here, {MAX_LINES} lines are allowed; split it"] if lines > MAX_LINES else []


def absolute_imports(node: ast.AST, *, into_try: bool) -> Iterator[tuple[int, str]]:
    """Yields line and name of each absolute import below a node, at any depth."""
    if isinstance(node, ast.Try) and not into_try:
        return
    if isinstance(node, ast.Import):
        yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level:
        yield node.lineno, node.module or ""
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
        yield from (
            (node.lineno, a.value) for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)
        )
    for child in ast.iter_child_nodes(node):
        yield from absolute_imports(child, into_try=into_try)


EVERYWHERE: list[Callable[[str], list[str]]] = [missing_licence, imports_of_the_folder]
IN_SOURCE = [*EVERYWHERE, excess_length]
IN_MODELING = [
    *IN_SOURCE,
    nested_relative_imports,
    imports_beyond_requirements,
    imports_of_rcc_hf,
    differences_from_the_loader,
    auto_class_registrations,
]
FILES = [(MODELING, IN_MODELING), (SOURCE, IN_SOURCE), (OTHERS, EVERYWHERE)]
CASES = [(path, rule) for paths, rules in FILES for path in paths for rule in rules]


def test_there_are_files_to_check():
    assert MODELING
    assert SOURCE


@pytest.mark.parametrize(
    ("path", "rule"), CASES, ids=[f"{path.relative_to(ROOT)}-{rule.__name__}" for path, rule in CASES]
)
def test_rule(path, rule):
    assert rule(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", MODELING, ids=lambda path: path.name)
def test_the_loader_finds_what_is_there(path):
    """The same question put to transformers itself, whose reading of the files the rules above restate."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    relative = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}
    assert set(get_relative_imports(path)) == relative
    assert [name for name in relative if not (path.parent / f"{name}.py").is_file()] == []
    assert set(get_imports(path)) <= ALLOWED | sys.stdlib_module_names


GOOD = """\
# SPDX-License-Identifier: Apache-2.0
\"\"\"Reads like prose, from . to the end; `from .x import y` inside a line is no import.\"\"\"

import math
from collections.abc import Callable

import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedModel

from .cache_rcc import (
    RCCCache,
)

try:
    import triton
except ImportError:
    triton = None


def late():
    from .memory import SCHEMES

    torch.library.register("op", SCHEMES)
    return AutoConfig.from_pretrained("x")
"""


@pytest.mark.parametrize("rule", IN_MODELING)
def test_rules_accept_what_is_right(rule):
    assert rule(GOOD) == []


@pytest.mark.parametrize(
    ("rule", "bad", "line"),
    [
        (nested_relative_imports, "from . import memory", 1),
        (nested_relative_imports, "import math\nfrom .. import memory", 2),
        (nested_relative_imports, "from ..memory import x", 1),
        (nested_relative_imports, "try:\n    from .schemes.memory import x\nexcept ImportError:\n    pass", 2),
        (imports_beyond_requirements, "import peft", 1),
        (imports_beyond_requirements, "import math, numpy.linalg", 1),
        (imports_beyond_requirements, "def f():\n    from einops import rearrange", 2),
        (imports_beyond_requirements, "if TYPE_CHECKING:\n    import datasets", 2),
        (imports_beyond_requirements, "importlib.import_module('triton')", 1),
        (imports_of_rcc_hf, "import rcc_hf", 1),
        (imports_of_rcc_hf, "try:\n    from rcc_hf.hub import push\nexcept ImportError:\n    push = None", 2),
        (imports_of_rcc_hf, "importlib.import_module('rcc_hf.hub')", 1),
        (imports_of_the_folder, "from modeling.memory import x", 1),
        (imports_of_the_folder, "import torch, modeling", 1),
        (differences_from_the_loader, '"""Use it so:\n\n    from .memory import x\n"""', 3),
        (differences_from_the_loader, '"""Or so:\nimport .memory\n"""', 2),
        (differences_from_the_loader, "from .a import x; from .b import y", 1),
        (differences_from_the_loader, "if True: from .a import x", 1),
        (auto_class_registrations, "AutoConfig.register('rcc', RCCConfig)", 1),
        (auto_class_registrations, "import transformers\ntransformers.AutoModel.register(a, b)", 2),
        (auto_class_registrations, "from transformers import AutoModel as Registry\nRegistry.register(a, b)", 2),
        (auto_class_registrations, "for register in [AutoModel.register]:\n    register(a, b)", 1),
        (missing_licence, "import torch\n# SPDX-License-Identifier: Apache-2.0", 1),
        (missing_licence, "# SPDX-License-Identifier: MIT\n", 1),
        (excess_length, "pass\n" * (MAX_LINES + 1), MAX_LINES + 1),
    ],
)
def test_rules_find_what_is_wrong(rule, bad, line):
    assert [message.split(":")[0] for message in rule(bad)] == [f"line {line}"]
