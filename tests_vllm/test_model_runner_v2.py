"""The wrappers around vLLM's second model runner, which needs Triton and can't run on a CPU.

Its class is the real one; the methods that are wrapped are replaced by stubs that are called as
its `execute_model` calls them.
"""

import inspect
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from moesteer.engines.vllm import plugin

SOURCE = inspect.getsource(GPUModelRunner)


class Recorder:
    """In the place of `Rows`."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def forget(self, ended: Any) -> None:
        self.calls.append(("forget", set(ended)))

    def preempt(self, stopped: Any) -> None:
        self.calls.append(("preempt", set(stopped)))

    def begin(self, ids: Any, scheduled: Any, computed: Any, extra_args: Any) -> None:
        args = [extra_args(request) for request in ids]
        self.calls.append(("begin", ids, scheduled.tolist(), computed.tolist(), args))

    def after(self, hidden: Any) -> None:
        self.calls.append(("after", hidden))


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Any:
    def add_requests(self: Any, scheduler_output: Any) -> None:
        self.order.append("add")

    def prepare_inputs(self: Any, scheduler_output: Any, state: Any, desc: Any, loras: int) -> Any:
        self.order.append("prepare")
        return state

    def execute_model(self: Any, scheduler_output: Any, *_: Any, dummy_run: bool = False) -> str:
        self.execute_model_state = None
        if not dummy_run:
            self.add_requests(scheduler_output)
            if scheduler_output.batch is None:
                return "nothing to run"
            self.prepare_inputs(scheduler_output, scheduler_output.batch, None, 0)
        self.execute_model_state = SimpleNamespace(hidden_states="hidden")
        return "ran"

    for stub in (add_requests, prepare_inputs, execute_model):
        monkeypatch.setattr(GPUModelRunner, stub.__name__, stub)
    plugin._patch_v2()
    made: Any = object.__new__(GPUModelRunner)
    made.moesteer_rows, made.order, made.execute_model_state = Recorder(), [], None
    return made


def new(id: str, name: str | None) -> Any:
    extra = None if name is None else {"moesteer": name}
    return SimpleNamespace(req_id=id, sampling_params=SimpleNamespace(extra_args=extra))


def step(
    *started: Any, finished: tuple = (), preempted: tuple | None = None, **batch: tuple[int, int]
) -> Any:
    """What the scheduler says: each request of the batch with tokens to run, and those computed."""
    arrays = np.array(list(batch.values())).reshape(-1, 2)
    return SimpleNamespace(
        scheduled_new_reqs=list(started),
        finished_req_ids=set(finished),
        preempted_req_ids=None if preempted is None else set(preempted),
        batch=SimpleNamespace(
            req_ids=list(batch),
            num_scheduled_tokens=arrays[:, 0],
            num_computed_tokens_np=arrays[:, 1],
        )
        if batch
        else None,
    )


def test_each_step_is_told(runner: Any) -> None:
    assert runner.execute_model(step(new("a", "x"), new("b", None), a=(5, 0), b=(3, 0))) == "ran"
    assert runner.moesteer_rows.calls == [
        ("forget", set()),
        ("preempt", set()),
        ("begin", ["a", "b"], [5, 3], [0, 0], [{"moesteer": "x"}, None]),
        ("after", "hidden"),
    ]
    assert runner.order == ["add", "prepare"]


def test_what_ended_is_forgotten(runner: Any) -> None:
    runner.execute_model(step(new("a", "x"), new("b", "y"), a=(5, 0), b=(3, 0)))
    runner.moesteer_rows.calls.clear()
    runner.execute_model(step(finished=("a",), preempted=("b",)))
    assert runner.moesteer_rows.calls == [
        ("forget", {"a"}),
        ("preempt", {"b"}),
        ("after", None),
    ]
    assert list(runner.moesteer_extra_args) == ["b"]
    # A preempted request comes as a new one, from its first token.
    runner.execute_model(step(new("b", "y"), b=(8, 0)))
    assert ("begin", ["b"], [8], [0], [{"moesteer": "y"}]) in runner.moesteer_rows.calls


def test_a_request_may_take_the_id_of_one_that_has_ended(runner: Any) -> None:
    runner.execute_model(step(new("a", "x"), a=(5, 0)))
    runner.execute_model(step(new("a", "y"), finished=("a",), a=(2, 0)))
    assert runner.moesteer_rows.calls[-2] == ("begin", ["a"], [2], [0], [{"moesteer": "y"}])


def test_made_up_steps_are_not_told(runner: Any) -> None:
    runner.execute_model(step(), None, dummy_run=True)
    assert runner.moesteer_rows.calls == []


def test_a_runner_that_cannot_be_steered_is_left_alone(runner: Any) -> None:
    del runner.moesteer_rows
    assert runner.execute_model(step(new("a", None), a=(5, 0))) == "ran"


def test_vllm_calls_what_is_wrapped_as_the_stubs_are_called() -> None:
    assert re.search(
        r"self\.finish_requests\(.*self\.add_requests\(scheduler_output\)", SOURCE, re.S
    )
    assert re.search(r"input_batch = self\.prepare_inputs\(\s*scheduler_output,", SOURCE)
    assert "self.execute_model_state = ExecuteModelState(" in SOURCE
    assert "dummy_run=True" in SOURCE
