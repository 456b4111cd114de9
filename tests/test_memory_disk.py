# SPDX-License-Identifier: Apache-2.0
"""A full disk while a memory is saved: the older one stays whole, nothing half written stays, and the error says so."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError
from tiny import rcc_model, tokens

from rcc_hf import RCCMemory
from rcc_hf.modeling import compressed_rcc
from rcc_hf.modeling.compressed_files_rcc import CONFIG_NAME, WEIGHTS_NAME

NAMES = (WEIGHTS_NAME, CONFIG_NAME)
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
# in these words safetensors reports what the system refused; it has no OSError
FULL_FOR_SAFETENSORS = SafetensorError(
    f"Error while serializing: I/O error: {os.strerror(errno.ENOSPC)} (os error {errno.ENOSPC})"
)
REASON = {WEIGHTS_NAME: [FULL, FULL_FOR_SAFETENSORS], CONFIG_NAME: [FULL]}


@pytest.fixture(scope="module")
def memories():
    """An older memory and a newer, larger one."""
    model = rcc_model()
    return model.compress(tokens(1, 37, seed=5)), model.compress(tokens(2, 150))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def assert_told(error: OSError, name: str, number: int) -> None:
    """The error has its number, the name of the file, and what became of it."""
    assert error.errno == number
    for part in (os.strerror(number), name, "nothing was replaced"):
        assert part in str(error)


def break_writing(monkeypatch, name: str, reason: Exception) -> None:
    """Have the write of one of the two files stop in the middle."""
    if name == WEIGHTS_NAME:

        def save_file(tensors, path, metadata):
            Path(path).write_bytes(b"half a file")
            raise reason

        monkeypatch.setattr(compressed_rcc, "save_file", save_file)
    else:
        whole = Path.write_text

        def write_text(path, text, *arguments, **keywords):
            whole(path, text[: len(text) // 2], *arguments, **keywords)
            raise reason

        monkeypatch.setattr(Path, "write_text", write_text)


@pytest.mark.parametrize("older", [False, True], ids=["first save", "overwrite"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [(name, reason) for name in NAMES for reason in REASON[name]],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_a_write_that_stops_in_the_middle_changes_nothing(memories, name, reason, older, tmp_path, monkeypatch):
    if older:
        memories[0].save_pretrained(tmp_path)
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        break_writing(patch, name, reason)
        with pytest.raises(OSError, match="No space left") as raised:
            memories[1].save_pretrained(tmp_path)
    assert_told(raised.value, str(tmp_path / name), errno.ENOSPC)
    assert raised.value.__cause__ is reason
    assert contents(tmp_path) == before
    if older:
        assert repr(RCCMemory.from_pretrained(tmp_path)) == repr(memories[0])
    memories[1].save_pretrained(tmp_path)
    assert repr(RCCMemory.from_pretrained(tmp_path)) == repr(memories[1])


def test_other_errors_of_safetensors_stay_what_they_are(memories, tmp_path, monkeypatch):
    """Those without a number of the system are no matter of the disk."""
    with monkeypatch.context() as patch:
        break_writing(patch, WEIGHTS_NAME, SafetensorError("Error while serializing: InvalidHeader"))
        with pytest.raises(SafetensorError, match="InvalidHeader"):
            memories[1].save_pretrained(tmp_path)
    assert contents(tmp_path) == {}


# Run with: the folder of the older memory, of the newer one, a place to save to, and what limits it. Prints a JSON list
# of [with an older memory?, file that fails, class, errno, message, folder unchanged?, then saved with room?].
SAVER = """\
import json, os, resource, shutil, sys
from pathlib import Path
from rcc_hf import RCCMemory

older, newer, place, limit = sys.argv[1:]
sizes = {path.name: path.stat().st_size for path in Path(newer).iterdir()}
newer = RCCMemory.from_pretrained(newer)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def fill(path, name):
    '''Leave pages for all of the newer weights (which need one more while their file is made), or for half of them.'''
    disk = os.statvfs(place)
    pages = -(-sizes["memory.safetensors"] // disk.f_frsize)
    left = pages if name == "memory.json" else pages // 2
    path.write_bytes(bytes((disk.f_bavail - left) * disk.f_frsize))


found = []
for again in (False, True):
    for name in ("memory.safetensors", "memory.json") if limit == "disk" else ("memory.safetensors",):
        folder = Path(place) / f"{again}-{name}"
        folder.mkdir()
        if again:
            shutil.copytree(older, folder, dirs_exist_ok=True)
        before, filler = contents(folder), Path(place) / "filler"
        usual = resource.getrlimit(resource.RLIMIT_FSIZE)
        if limit == "disk":
            fill(filler, name)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[name] // 2, usual[1]))
        try:
            newer.save_pretrained(folder)
            result = ["nothing", 0, ""]
        except Exception as error:
            result = [type(error).__name__, getattr(error, "errno", None), str(error)]
        same = contents(folder) == before
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        filler.unlink(missing_ok=True)
        newer.save_pretrained(folder)
        loaded = repr(RCCMemory.from_pretrained(folder)) == repr(newer)
        found.append([again, str(folder / name), *result, same, loaded])
        shutil.rmtree(folder)
print(json.dumps(found))
"""


def run_saver(memories, tmp_path: Path, limit: str, prefix: list[str]) -> list:
    """What `SAVER` finds, started by the command `prefix`."""
    for memory, name in zip(memories, ("older", "newer"), strict=True):
        memory.save_pretrained(tmp_path / name)
    place = tmp_path / "place"
    place.mkdir()
    command = [*prefix, sys.executable, "-c", SAVER, *(str(tmp_path / n) for n in ("older", "newer", "place")), limit]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def assert_nothing_changed(found: list, number: int) -> None:
    for older, path, kind, given, message, same, loaded in found:
        where = f"{path}, {'overwrite' if older else 'first save'}: {kind}: {message}"
        assert (given, same, loaded) == (number, True, True), where
        assert_told(OSError(given, message), path, number)


def test_a_file_that_may_not_grow_so_large_changes_nothing(memories, tmp_path):
    """The limit that shells set with `ulimit -f`: the system refuses in the midst of the weights."""
    pytest.importorskip("resource")
    found = run_saver(memories, tmp_path, "size", [])
    assert [older for older, *_ in found] == [False, True]
    assert_nothing_changed(found, errno.EFBIG)


def small_disk(folder: Path, size: int) -> list[str]:
    """A command that runs its arguments where `folder` is a file system of `size` bytes, which only they see."""
    mount = f'mount -t tmpfs -o size={size} tmpfs "{folder}" && exec "$@"'
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]


def test_a_full_disk_changes_nothing(memories, tmp_path):
    """For each file and for both: the last page is taken by something else."""
    try:
        probe = subprocess.run([*small_disk(tmp_path, 65536), "true"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no unshare(1)")
    if probe.returncode:
        pytest.skip(f"no file system can be mounted here: {probe.stderr.strip()}")
    size = 4 * sum(tensor.nbytes for tensor in memories[1]._tensors().values()) + 2**20
    found = run_saver(memories, tmp_path, "disk", small_disk(tmp_path / "place", size))
    assert [(older, Path(path).name) for older, path, *_ in found] == [(o, n) for o in (False, True) for n in NAMES]
    assert_nothing_changed(found, errno.ENOSPC)
