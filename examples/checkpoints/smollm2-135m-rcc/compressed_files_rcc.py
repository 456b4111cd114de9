# SPDX-License-Identifier: Apache-2.0
"""Where the files of a memory are: in a folder, or in a repository on the Hub."""

import os
import re
import stat
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import create_branch, create_repo, hf_hub_download, upload_folder
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

WEIGHTS_NAME = "memory.safetensors"
CONFIG_NAME = "memory.json"


def replace_files(writers: dict[Path, Callable[[str], object]]) -> None:
    """Have each function fill a temporary file beside its target, then put all in place; on failure the old files stay.

    Raises:
        OSError: if the system refuses to write, as on a full disk.
    """
    temporaries = {target: target.with_name(f".{target.name}.{uuid.uuid4().hex}") for target in writers}
    try:
        for target, temporary in temporaries.items():
            _fill(temporary, target, writers[target])
        for target, temporary in temporaries.items():
            os.replace(temporary, target)
    except BaseException:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
        raise


def _fill(temporary: Path, target: Path, write: Callable[[str], object]) -> None:
    try:
        temporary.touch()
        usual = stat.S_IMODE(temporary.stat().st_mode)
        write(str(temporary))
        temporary.chmod(usual)  # safetensors hides its files from other users
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None) or _number_of(error)
        if number is None:
            raise
        reason = f"{os.strerror(number)}; nothing was replaced, what was there before is as it was"
        raise OSError(number, reason, str(target)) from error


def _number_of(error: Exception) -> int | None:
    """What the system's refusal is numbered, which safetensors has in its text only."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def find_weights(source: str | os.PathLike, **hub) -> Path:
    """The file that a memory is read from (it holds the description too); a folder wins over a name on the Hub.

    Args:
        hub: arguments of downloading (`revision`, `token`, `cache_dir`).

    Raises:
        ValueError: if there is no such folder, repository or revision, or no memory in it.
        ConnectionError: if the Hub cannot be reached and the file is not in the cache.
    """
    folder = Path(source)
    if folder.is_dir() or not _may_be_on_the_hub(source):
        if not (folder / WEIGHTS_NAME).is_file():
            raise ValueError(
                f"{source} holds no memory: there is no {WEIGHTS_NAME}. Give a folder that "
                "RCCMemory.save_pretrained wrote, or a repository that push_to_hub wrote."
            )
        return folder / WEIGHTS_NAME
    try:
        return Path(hf_hub_download(str(source), WEIGHTS_NAME, **hub))
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{source} is neither a folder here nor a repository on the Hub that you can see. Check the spelling; for "
            "a private or gated repository pass token=..., or log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(
            f"the repository {source} has no revision {hub.get('revision')!r}; give a branch, tag or commit that it has"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"{source} is no folder here, the Hub cannot be reached (or is switched off), and the cache does not hold "
            f"{WEIGHTS_NAME} of it. Give a folder that RCCMemory.save_pretrained wrote, or try again with a connection."
        ) from error
    except EntryNotFoundError as error:
        raise ValueError(
            f"the repository {source} holds no memory: there is no {WEIGHTS_NAME}. Give one that "
            "RCCMemory.push_to_hub wrote."
        ) from error


def upload(save: Callable[[str], None], repo_id: str, *, private, token, revision: str | None = None, **kwargs):
    """Have `save` write files into a folder and upload them; the repository and the branch are made if need be.

    Args:
        kwargs: further arguments of `huggingface_hub.upload_folder`, whose result is returned.
    """
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        repo_id = create_repo(repo_id, token=token, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):  # that is a pull request
            create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        kwargs = {"commit_message": "Upload memory", **kwargs}
        return upload_folder(repo_id=repo_id, folder_path=folder, token=token, revision=revision, **kwargs)


def _may_be_on_the_hub(source: str | os.PathLike) -> bool:
    """Whether this is text of the form `name` or `owner/name`, rather than a path."""
    if not isinstance(source, str):
        return False
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True
