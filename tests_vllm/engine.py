"""Engines of vLLM for a test, one after another in the same process."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm import LLM
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.models import registry

from moesteer.engines.vllm_engine import VllmEngine, load_vllm
from moesteer.profile import Profile

# It looks at each model class in a process of its own, lest CUDA be initialised: seconds apiece.
registry._run_in_subprocess = lambda look: look()

_MIB = 1024**2

SMALL: dict[str, Any] = {
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 16,
    "max_logprobs": -1,
    "kv_cache_memory_bytes": 64 * _MIB,
    "seed": 0,
    "use_tqdm_on_load": False,
}


@contextmanager
def running(model: Path, **arguments: Any) -> Iterator[LLM]:
    """An engine of the model in `model`, in float32 and small; its memory is free afterwards.

    Args:
        model: a folder.
        arguments: of `LLM`; they go before what stands here.
    """
    given: dict[str, Any] = {"dtype": "float32"} | SMALL | arguments
    llm = LLM(str(model), **given)
    try:
        yield llm
    finally:
        shut_down(llm)
        del llm
        gc.collect()


@contextmanager
def steerable(
    model: str | Path, profiles: Sequence[Profile] = (), **options: Any
) -> Iterator[VllmEngine]:
    """The same as `--engine vllm` starts it, for `profiles`."""
    engine = load_vllm(str(model), dtype="float32", options=SMALL | options, profiles=profiles)
    try:
        yield engine
    finally:
        shut_down(engine.llm)
        del engine
        gc.collect()


def shut_down(llm: LLM) -> None:
    # The core is frozen out of garbage collection until it is shut down, and torch's process group
    # allows no second one.
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
