"""The entry point `vllm.general_plugins`: vLLM calls `register` once in each of its processes.

It wraps these methods of the stock wheel, and nothing else:

    MoERunner._maybe_dispatch            logits are steered                              (seam)
    Worker.load_model                    the loaded model is put under the seam          (worker)
    GPUModelRunner._prepare_inputs (V1)  whose tokens the step runs                      (rows)
    GPUModelRunner.prepare_inputs (V2)   the same
    GPUModelRunner.execute_model (both)  what has ended; after it, the step is counted   (rows)
    InputProcessor.process_inputs        a request's name becomes a fingerprint          (names)
    VllmConfig.compute_hash              graphs with the seam are cached apart from those without

`MOESTEER_DISABLE=1` leaves vLLM alone. A method that is not there makes engines of this version
unsteerable, with the reason; it breaks nothing else.
"""

import functools
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import numpy as np

DISABLE = "MOESTEER_DISABLE"
APART = "MOESTEER_APART"
"""Set by our commands: vLLM's processes leave the terminal's process group."""

_registered = False


def register() -> None:
    """Wrap vLLM's methods, once a process."""
    global _registered
    if _registered or os.environ.get(DISABLE, "0") not in ("", "0"):
        return
    _registered = True
    if APART in os.environ and multiprocessing.parent_process() is not None:
        os.setpgrp()  # so that Ctrl-C reaches the command alone, which ends them
    missing: list[str] = []
    for patch in (_patch_runner, _patch_v1, _patch_v2, _patch_frontend, _patch_hash):
        try:
            patch()
        except (ImportError, AttributeError) as absent:
            missing.append(str(absent))
    _patch_worker(missing)


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a method by `around(original, self, …)`; AttributeError where there is none."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    setattr(owner, name, wrapped)


def _patch_runner() -> None:
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    from moesteer.engines.vllm.seam import steered_dispatch

    BaseRouter._compute_routing  # noqa: B018 (wrapped a layer at a time, in attach)
    _wrap(MoERunner, "_maybe_dispatch", steered_dispatch)


def _patch_v1() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def prepare(
        original: Any, runner: Any, scheduler_output: Any, scheduled: Any, *rest: Any
    ) -> Any:
        prepared = original(runner, scheduler_output, scheduled, *rest)
        rows = getattr(runner, "moesteer_rows", None)
        if rows is not None:
            batch = runner.input_batch
            ids = batch.req_ids
            rows.begin(
                ids,
                np.asarray(scheduled),
                batch.num_computed_tokens_cpu[: len(ids)],
                lambda request: _extra_args(runner.requests[request].sampling_params),
            )
        return prepared

    _wrap(GPUModelRunner, "_prepare_inputs", prepare)
    _wrap(GPUModelRunner, "execute_model", _counted_step)


def _patch_v2() -> None:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    def add(original: Any, runner: Any, scheduler_output: Any) -> Any:
        if getattr(runner, "moesteer_rows", None) is not None:
            known = runner.__dict__.setdefault("moesteer_extra_args", {})
            for request in scheduler_output.finished_req_ids:
                known.pop(request, None)
            for request in scheduler_output.scheduled_new_reqs:  # perhaps under an old one's id
                known[request.req_id] = _extra_args(request.sampling_params)
        return original(runner, scheduler_output)

    def prepare(original: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
        batch = original(runner, *args, **kwargs)
        rows = getattr(runner, "moesteer_rows", None)
        if rows is not None:
            rows.begin(
                batch.req_ids,
                batch.num_scheduled_tokens,
                batch.num_computed_tokens_np,
                runner.moesteer_extra_args.get,
            )
        return batch

    _wrap(GPUModelRunner, "add_requests", add)
    _wrap(GPUModelRunner, "prepare_inputs", prepare)
    _wrap(GPUModelRunner, "execute_model", _counted_step)


def _counted_step(
    original: Any, runner: Any, scheduler_output: Any, *args: Any, **kwargs: Any
) -> Any:
    rows = getattr(runner, "moesteer_rows", None)
    if rows is None or kwargs.get("dummy_run"):
        return original(runner, scheduler_output, *args, **kwargs)
    rows.forget(scheduler_output.finished_req_ids)
    rows.preempt(scheduler_output.preempted_req_ids or ())
    output = original(runner, scheduler_output, *args, **kwargs)
    state = runner.execute_model_state
    rows.after(None if state is None else state.hidden_states)
    return output


def _patch_frontend() -> None:
    from vllm.v1.engine.input_processor import InputProcessor

    from moesteer.engines.vllm.names import Names

    def construct(
        original: Any, processor: Any, vllm_config: Any, *args: Any, **kwargs: Any
    ) -> None:
        processor.moesteer = Names.at_start(vllm_config)
        original(processor, vllm_config, *args, **kwargs)

    def process(original: Any, processor: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(processor, *args, **kwargs)
        processor.moesteer.resolve(request)
        return request

    InputProcessor.process_inputs  # noqa: B018 (both or none)
    _wrap(InputProcessor, "__init__", construct)
    _wrap(InputProcessor, "process_inputs", process)


def _patch_hash() -> None:
    from vllm.config import VllmConfig

    from moesteer.engines.vllm.hooks import known_streams
    from moesteer.engines.vllm.seam import known_layers
    from moesteer.version import __version__

    def compute(original: Any, config: Any, *args: Any, **kwargs: Any) -> str:
        # A graph names its layers by number, so those of a process's second engine differ.
        suffix = f"-moesteer-{__version__}-{known_layers()}-{known_streams()}"
        return original(config, *args, **kwargs) + suffix

    _wrap(VllmConfig, "compute_hash", compute)


def _patch_worker(missing: list[str]) -> None:
    from vllm.v1.worker.gpu_worker import Worker

    from moesteer.engines.vllm.worker import WorkerCalls, after_load

    def load(original: Any, worker: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = original(worker, *args, **kwargs)
        after_load(worker, missing)
        return loaded

    _wrap(Worker, "load_model", load)
    for name, call in vars(WorkerCalls).items():
        if name.startswith("moesteer_"):
            setattr(Worker, name, call)


def _extra_args(params: Any) -> dict[str, Any] | None:
    return None if params is None else params.extra_args
