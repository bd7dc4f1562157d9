"""A split model for a command: this process leads, others on the same machine follow.

A command is written for one process, and so only one runs it. It starts the others, loads its share
of the model while they load theirs, and whatever it asks of its engine they are told to do as well
(`following.py`), each with its share. Files, progress and errors are the leader's alone.

What a follower is told goes through a pipe, pickled: it closes with the leader, however that ends.
"""

import atexit
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from moesteer.engines.base import Engine
from moesteer.engines.transformers.splitting import Split
from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.errors import MoesteerError

GRACE = 10.0
"""Seconds that the leader has to fail of the same cause before it is ended with a follower."""


def load_split(model: str, split: Split, processes: int, **options: Any) -> TransformersEngine:
    """Load a model split over so many processes of this machine, one a GPU where there are any.

    `options` are those of `load_transformers`. Raises MoesteerError where the model can't be split.
    """
    import torch

    devices = torch.cuda.device_count() if torch.cuda.is_available() else processes
    if not 2 <= processes <= devices:
        raise MoesteerError(
            f"--{split}-parallel is {processes}; it must be at least 2"
            + (f", and there are {devices} GPUs." if processes > devices else ".")
        )
    followers = _Followers(processes, (model, {**options, "split": split}))
    engine = load_transformers(model, **options, split=split)
    for name in (name for name in vars(Engine) if not name.startswith("_")):
        if callable(getattr(engine, name, None)):
            setattr(engine, name, followers.led(name, getattr(engine, name)))
    return engine


class _Followers:
    """The other processes, told of every call before it is made here."""

    def __init__(self, processes: int, loading: object) -> None:
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        shared |= {"WORLD_SIZE": str(processes)}
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
        quiet |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        os.environ |= shared | {"RANK": "0", "LOCAL_RANK": "0"}
        self._ending = self._within = False
        self._alone = threading.RLock()  # all must do the same in the same order
        self._started = [
            subprocess.Popen(
                [sys.executable, "-m", "moesteer.engines.following"],
                env=os.environ | quiet | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is the leader's to hear
            )
            for rank in range(1, processes)
        ]
        atexit.register(self._end)
        for number, follower in enumerate(self._started, start=2):
            threading.Thread(target=self._watch, args=(number, follower), daemon=True).start()
        self._tell(loading)

    def led(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, called in all processes; what it gives one by one is all made at once."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self._alone:
                if self._within:  # a method that asks another, as it does in the followers
                    return method(*args, **kwargs)
                followed = {key: value for key, value in kwargs.items() if key != "progress"}
                self._tell((name, args, followed))
                self._within = True
                try:
                    result = method(*args, **kwargs)
                    return iter(list(result)) if isinstance(result, Iterator) else result
                finally:
                    self._within = False

        return call

    def _tell(self, what: object) -> None:
        said = pickle.dumps(what)
        for follower in self._started:
            assert follower.stdin is not None
            try:
                follower.stdin.write(said)
                follower.stdin.flush()
            except BrokenPipeError:  # it has ended; who watches it says why
                time.sleep(2 * GRACE)
                raise

    def _watch(self, number: int, follower: "subprocess.Popen[bytes]") -> None:
        """End with a follower that ends first: what we share with it would be waited for."""
        assert follower.stdout is not None
        why = follower.stdout.read().decode(errors="replace").strip()
        status = follower.wait()
        if self._ending:
            return
        time.sleep(GRACE)
        print(
            f"moesteer: process {number} of {len(self._started) + 1} ended with status {status}."
            + (f" It said: {why}" if why else ""),
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    def _end(self) -> None:
        self._ending = True
        for follower in self._started:
            follower.kill()
            follower.wait()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
