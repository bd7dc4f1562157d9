"""Output files that are never half-written: written beside, moved into place, one run at a time."""

import errno
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moesteer.errors import MoesteerError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there in one step.

    Readers see the old file or the new one. Raises MoesteerError where the folder is missing or not
    writable, or the disk is full; the old file is then untouched.
    """
    check_writable(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise MoesteerError(_why_not_written(path, error)) from error
    except Exception as error:
        if "No space left" in str(error):  # safetensors wraps the operating system's error
            raise MoesteerError(_why_not_written(path, error)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def check_writable(path: Path) -> None:
    """Raise MoesteerError now, before hours of work, if `path` can't be written."""
    if path.is_dir():
        raise MoesteerError(f"{path} is a folder; give the name of a file to write.")
    if not path.parent.is_dir():
        raise MoesteerError(f"{path} can't be written: the folder {path.parent} does not exist.")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise MoesteerError(f"{path} can't be written: permission denied.")


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


def _why_not_written(path: Path, error: Exception) -> str:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space" in str(error)
    why = "the disk is full" if full else str(error)
    return f"{path} could not be written: {why}. What was there before is unchanged."


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
