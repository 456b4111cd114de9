# SPDX-License-Identifier: Apache-2.0
"""Repositories of the Hub as they lie in the user's cache, so that loading by name works offline."""

import hashlib
import shutil
from pathlib import Path


def put_into_cache(cache: Path, repo_id: str, folder: Path, revision: str = "main") -> None:
    """Make the files of `folder` those of `repo_id` at `revision`, as a download would have left them in `cache`."""
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    commit = hashlib.sha1(f"{repo_id}@{revision}".encode()).hexdigest()
    shutil.copytree(folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / revision).write_text(commit)
