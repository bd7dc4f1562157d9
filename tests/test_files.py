"""Output files: whole or not at all, and one run at a time."""

import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from moesteer.errors import MoesteerError
from moesteer.files import (
    check_writable,
    growing_lines,
    sole_writer,
    write_atomically,
    write_text,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that is there already."""
    (tmp_path / "out.txt").write_text("old")
    return tmp_path / "out.txt"


def alone(path: Path) -> bool:
    """Nothing lies beside the file."""
    return [p.name for p in path.parent.iterdir()] == [path.name]


def test_write_text(path: Path):
    write_text(path, "neu: –\n")
    assert path.read_bytes() == "neu: –\n".encode()
    assert alone(path)


def test_permissions_are_those_of_any_new_file(tmp_path: Path):
    write_text(tmp_path / "ours", "")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("failure", [ValueError("no"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_the_old_file(path: Path, failure: BaseException):
    def half(temporary: Path) -> None:
        temporary.write_text("half")
        assert path.read_text() == "old"  # readers never see the half
        raise failure

    with pytest.raises(type(failure)):
        write_atomically(path, half)
    assert path.read_text() == "old"
    assert alone(path)


def raiser(error: Exception) -> Callable[..., object]:
    def fail(*_args: object, **_kwargs: object) -> object:
        raise error

    return fail


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("where", ["mkstemp", "fsync"])
def test_disk_full(path: Path, monkeypatch: pytest.MonkeyPatch, where: str, code: int):
    module = {"mkstemp": "tempfile.mkstemp", "fsync": "os.fsync"}[where]
    monkeypatch.setattr(module, raiser(OSError(code, os.strerror(code))))
    with pytest.raises(MoesteerError, match=r"out\.txt could not be written: the disk is full"):
        write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert alone(path)


def big_array(file: Path) -> None:
    save_file({"a": np.zeros(100_000)}, file)


def big_text(file: Path) -> None:
    file.write_text("a" * 800_000)


@pytest.mark.parametrize("write", [big_array, big_text])
def test_a_write_that_the_system_stops(path: Path, write: Callable[[Path], None]):
    # A limit on the size of files stops a write half-way, as a full disk does.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(MoesteerError, match=r"out\.txt could not be written: .*too large"):
            write_atomically(path, write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "old"
    assert alone(path)


def test_safetensors_on_a_full_disk(path: Path):
    from safetensors import SafetensorError

    wrapped = SafetensorError("I/O error: No space left on device (os error 28)")
    with pytest.raises(MoesteerError, match="the disk is full"):
        write_atomically(path, raiser(wrapped))
    # Any other of its errors is a defect of ours and keeps its name.
    with pytest.raises(SafetensorError):
        write_atomically(path, raiser(SafetensorError("dtype not understood")))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "is a folder; give the name of a file"),
        ("missing/out", r"the folder .*missing does not exist"),
        ("out.txt/out", r"the folder .*out\.txt does not exist"),
        ("n" * 300, "File name too long"),
    ],
)
def test_where_no_file_can_be(path: Path, name: str, said: str):
    target = path.parent / name
    ran: list[Path] = []
    for attempt in (
        lambda: check_writable(target),
        lambda: write_atomically(target, ran.append),
        lambda: sole_writer(target).__enter__(),
    ):
        with pytest.raises(MoesteerError, match=said):
            attempt()
    assert not ran
    assert alone(path)


def test_a_folder_without_permission(path: Path, monkeypatch: pytest.MonkeyPatch):
    # Tests may run as root, whom nothing is denied: so the system's answer is put in its mouth.
    refused = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    monkeypatch.setattr("tempfile.NamedTemporaryFile", raiser(refused))
    with pytest.raises(MoesteerError, match="Permission denied"):
        check_writable(path)
    monkeypatch.undo()
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(MoesteerError, match="permission denied"):
        check_writable(path)


def test_a_device_is_not_replaced_by_a_file(tmp_path: Path):
    # As root, a file moved to /dev/null would take its place; a named pipe stands in for it.
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(MoesteerError, match="not an ordinary file"):
        write_text(pipe, "text")
    assert pipe.is_fifo()


def test_check_writable_leaves_nothing(path: Path):
    check_writable(path)
    check_writable(path.with_name("new"))
    assert alone(path)
    assert path.read_text() == "old"


# --- one run at a time ----------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from moesteer.files import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_on_one_output(path: Path):
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            said = rf"out\.txt is being written by another run \(process {holder.pid}\)"
            with pytest.raises(MoesteerError, match=said), sole_writer(path):
                pytest.fail("both hold the lock")
            with sole_writer(path.with_name("other.txt")):
                pass  # another output is free
        finally:
            holder.send_signal(signal.SIGKILL)
    with sole_writer(path):
        pass  # the lock of a killed run is gone
    assert alone(path)


def test_the_lock_is_free_again_after_an_error(path: Path):
    with pytest.raises(ValueError, match="stop"), sole_writer(path):
        raise ValueError("stop")
    with sole_writer(path):
        with pytest.raises(MoesteerError, match="another run"), sole_writer(path):
            pytest.fail("both hold the lock")
        write_text(path, "new")
    assert alone(path)


@pytest.mark.parametrize("anew", [False, True])
def test_a_lock_file_that_was_removed_since_is_no_lock(
    path: Path, monkeypatch: pytest.MonkeyPatch, anew: bool
):
    # The other run ends, and removes its lock, just between our opening the file and locking it:
    # whoever comes next makes a new file, so ours would lock nothing.
    lock = path.parent / ".out.txt.lock"
    flock = fcntl.flock

    def late(*args: int) -> None:
        lock.rename(lock.with_suffix(".gone"))  # renamed, lest the new one get its place on disk
        if anew:
            lock.touch()
        flock(*args)

    monkeypatch.setattr("moesteer.files.fcntl.flock", late)
    with pytest.raises(MoesteerError, match="another run"), sole_writer(path):
        pytest.fail("holds a lock that nobody sees")


# --- lines that grow ------------------------------------------------------------------------------


def stop_after(path: Path, *lines: str, identity: str = "x") -> int:
    """Lines of a run that is interrupted; how many it found of an earlier one."""
    found: list[int] = []
    try:
        with growing_lines(path, identity) as (kept, add):
            found.append(kept)
            for line in lines:
                add([line])
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        return found[0]


def test_growing_lines_end_up_in_the_file(path: Path):
    with growing_lines(path, "x") as (kept, add):
        assert kept == 0
        add(["one\u2028", "zwölf"])
        add([])
        assert path.read_text() == "old"
        with pytest.raises(MoesteerError, match="another run"), sole_writer(path):
            pytest.fail("both write")
        add(["three"])
    assert path.read_text() == "one\u2028\nzwölf\nthree\n"
    assert alone(path)


def test_growing_lines_are_taken_up(path: Path):
    assert stop_after(path, "one", "zwölf") == 0
    assert path.read_text() == "old"
    assert stop_after(path, "three") == 2
    with growing_lines(path, "x") as (kept, add):
        assert kept == 3
        add(["four"])
    assert path.read_text() == "one\nzwölf\nthree\nfour\n"
    assert alone(path)


def test_half_a_line_of_a_killed_run_is_dropped(path: Path):
    stop_after(path, "one", "zwölf")
    growing = path.parent / ".out.txt.lines.partial"
    growing.write_bytes(growing.read_bytes()[: -len("ölf\n".encode()) + 1])  # within the ö
    with growing_lines(path, "x") as (kept, add):
        assert kept == 1
        add(["two"])
    assert path.read_text() == "one\ntwo\n"


def test_lines_of_another_making_are_not_taken_up(path: Path):
    stop_after(path, "one")
    lines = growing_lines(path, "y")
    with pytest.raises(MoesteerError, match="other prompts or settings left 1 lines"), lines:
        pass
    with growing_lines(path, "x") as (kept, _):
        assert kept == 1
    assert path.read_text() == "one\n"


def test_a_run_that_made_nothing_leaves_nothing(path: Path):
    stop_after(path)
    assert path.read_text() == "old"
    assert alone(path)


def test_growing_lines_on_a_full_disk(path: Path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    said = r"out\.txt could not be written: File too large"
    try:
        with pytest.raises(MoesteerError, match=said), growing_lines(path, "x") as (_, add):
            add(["a" * 20_000])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "old"
