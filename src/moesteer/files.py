"""Output files: never half-written, never an input, one run at a time, taken up after a kill.

A file is written beside its place and moved there in one step (`write_atomically`); a lock keeps
two runs apart (`sole_writer`); lines that take long grow beside it (`growing_lines`).
"""

import errno
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moesteer.errors import MoesteerError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there in one step.

    Readers see the old file or the new one. Raises MoesteerError where the folder is missing or not
    writable, or the disk is full; the old file is then untouched.
    """
    check_writable(path)
    target = Path(os.path.realpath(path))  # through a link, which stays one
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(**_beside(target))
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(target)
    except OSError as error:
        raise MoesteerError(_why_not_written(path, error)) from error
    except Exception as error:
        if "os error" in str(error):  # safetensors wraps the operating system's error
            raise MoesteerError(_why_not_written(path, error)) from error
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def check_writable(path: Path, *inputs: str | None) -> None:
    """Raise MoesteerError now, before hours of work, if `path` can't be written.

    Nor may it be one of the `inputs`, files that are read for it.
    """
    for read in filter(None, inputs):
        if os.path.exists(read) and os.path.exists(path) and os.path.samefile(read, path):
            raise MoesteerError(f"{path} would overwrite what is read; give another --out.")
    # os.path rather than Path: where a folder may not be entered, it says no instead of raising.
    if os.path.isdir(path):
        raise MoesteerError(f"{path} is a folder; give the name of a file to write.")
    if os.path.exists(path) and not os.path.isfile(path):  # a device, which we would replace
        raise MoesteerError(f"{path} is not an ordinary file; give the name of a file to write.")
    if not os.path.isdir(path.parent):
        raise MoesteerError(f"{path} can't be written: the folder {path.parent} does not exist.")
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise MoesteerError(f"{path} can't be written: permission denied.")
    try:  # what is asked for, tried: permissions, a read-only disk, a name too long
        with tempfile.NamedTemporaryFile(**_beside(path)):
            pass
    except OSError as error:
        raise MoesteerError(_why_not_written(path, error)) from error


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Hold the lock of an output file; MoesteerError if another run holds it.

    The lock is the operating system's, so a killed run leaves none behind.
    """
    check_writable(path)
    lock = path.parent / f".{path.name}.lock"
    with lock.open("a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have removed it since we opened it, and a third made it anew.
            if not (lock.exists() and os.path.samestat(os.fstat(stream.fileno()), lock.stat())):
                raise BlockingIOError
        except OSError:
            stream.seek(0)
            holder = stream.read().strip() or "unknown"
            raise MoesteerError(
                f"{path} is being written by another run (process {holder})."
                " Wait for it, stop it, or give another output file."
            ) from None
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _beside(path: Path) -> dict[str, Any]:
    return {"dir": path.parent, "prefix": f".{path.name}.", "suffix": ".partial"}


@contextmanager
def growing_lines(path: Path, identity: str) -> Iterator[tuple[int, Callable[[list[str]], None]]]:
    """Lines of an output file that may be interrupted: they grow beside it and end up in it.

    Yields how many lines an interrupted run of the same `identity` (a text that says what is made)
    left, and a function that adds lines for good. The file itself appears, whole, at the end.
    """
    growing = path.parent / f".{path.name}.lines.partial"
    with sole_writer(path):
        kept = complete_lines(growing)
        if len(kept) > 1 and kept[0] != identity:
            raise MoesteerError(
                f"{path}: an interrupted run with other prompts or settings left {len(kept) - 1}"
                f" lines. Repeat that one to go on with it, or delete {growing}."
            )
        if kept[:1] != [identity]:
            kept = [identity]

        def add(lines: list[str]) -> None:
            append_lines(growing, lines, named=path)

        growing.unlink(missing_ok=True)
        add(kept)
        try:
            yield len(kept) - 1, add
        except BaseException:
            if len(complete_lines(growing)) == 1:  # nothing was made: nothing to go on from
                growing.unlink()
            raise
        text = growing.read_text(encoding="utf-8").partition("\n")[2]
        write_text(path, text)
        growing.unlink()


def append_lines(path: Path, lines: list[str], named: Path | None = None) -> None:
    """Add whole lines to a file, made where it is missing.

    Raises MoesteerError, of `named` or else of the file, where the disk is full.
    """
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write("".join(f"{line}\n" for line in lines))
    except OSError as error:
        raise MoesteerError(_why_not_written(named or path, error)) from error


def complete_lines(path: Path) -> list[str]:
    """The lines of a file that end with a newline; a killed run may leave half a line."""
    if not path.is_file():
        return []
    return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]


def _why_not_written(path: Path, error: Exception) -> str:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space" in str(error)
    why = "the disk is full" if full else getattr(error, "strerror", None) or str(error)
    return f"{path} could not be written: {why}. What was there before is unchanged."


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
