"""A server of `moesteer serve` for the tests: started, waited for, asked, stopped in order."""

import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

PATIENCE = 300
"""Seconds that an engine may take to start beside other work."""


@contextmanager
def served(
    command: Callable[[int], Sequence[str]], environment: Mapping[str, str], log: Path
) -> Iterator[str]:
    """The address of the server that the command for a free port starts; what it says is in `log`.

    Stopped by Ctrl-C, it must end in order.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("wb") as output:
        process = subprocess.Popen(command(port), env=environment, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + PATIENCE
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            try:
                httpx.get(f"{url}/health").raise_for_status()
                break
            except httpx.TransportError:
                time.sleep(0.3)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(30) == 0
        finally:
            process.kill()
