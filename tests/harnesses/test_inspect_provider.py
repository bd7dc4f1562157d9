"""Inspect's model provider, in process: replies of the engine, batches, settings, refusals."""

from pathlib import Path
from typing import Any

import pytest
from inspect_ai import Task
from inspect_ai import eval as evaluate
from inspect_ai.dataset import Sample
from inspect_ai.log import EvalLog
from inspect_ai.model import ChatMessageAssistant, ChatMessageUser, ContentImage, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import Solver, generate, use_tools
from inspect_ai.tool import Tool, tool

from made_suites import FOLLOWING, documents
from moesteer.chat import render_prompt
from moesteer.contrast import Message
from moesteer.engines.evidence import LayerEvidence
from moesteer.engines.transformers_engine import load_transformers
from moesteer.errors import MoesteerError
from moesteer.profile import Profile

pytestmark = [
    # Of what Inspect does with tenacity and anyio.
    pytest.mark.filterwarnings("ignore:The 'initial' parameter is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning"),
]

COUNT = 12
FOLLOW = Profile(activated=FOLLOWING)


@pytest.fixture(autouse=True)
def logs_elsewhere(in_tmp_path: Path) -> None:
    """Inspect writes a log of every run."""


@pytest.fixture
def follow(in_tmp_path: Path) -> str:
    FOLLOW.save(in_tmp_path / "follow.safetensors")
    return "follow.safetensors"


def run(
    model_args: dict[str, Any] | None = None, *, task: Task | None = None, **options: Any
) -> EvalLog:
    settings: dict[str, Any] = {"max_tokens": 16, "display": "none", "log_dir": "logs", **options}
    tasks = task or following()
    (log,) = evaluate(tasks, model="moesteer/testbed", model_args=model_args or {}, **settings)
    return log


def following(solver: Solver | list[Solver] | None = None) -> Task:
    samples = [Sample(line["prompt"], target=line["a"]) for line in documents(COUNT)]
    return Task(samples, solver=solver or generate(), scorer=includes())


def replies(log: EvalLog) -> list[str]:
    return [sample.output.completion for sample in log.samples or []]


def told(log: EvalLog) -> list[dict[str, Any]]:
    return [(sample.output.metadata or {})["moesteer"] for sample in log.samples or []]


def accuracy(log: EvalLog) -> float:
    assert log.results is not None
    return log.results.scores[0].metrics["accuracy"].value


def of_engine(profile: Profile | None) -> list[str]:
    engine = load_transformers("testbed")
    prompts = [
        render_prompt([Message("user", line["prompt"])], engine.tokenizer)
        for line in documents(COUNT)
    ]
    return engine.generate(prompts, profile, max_new_tokens=16).replies


def test_replies_are_the_engines_steered_and_unsteered(follow: str) -> None:
    plain, steered = run(), run({"profile": follow})
    assert replies(plain) == of_engine(None)
    assert replies(steered) == of_engine(FOLLOW)
    assert (accuracy(plain), accuracy(steered)) == (0.5, 1.0)
    assert all(one["profile"] is None and not one["fired"] for one in told(plain))
    for one in told(steered):
        assert (one["steered"], one["fingerprint"]) == (True, FOLLOW.fingerprint)
        assert [(seen["layer"], seen["obeyed"]) for seen in one["fired"]] == [(1, True), (2, True)]
        assert one["fired"][0]["activated"]["9"] == one["fired"][0]["tokens"] > 30
    assert max(one["batch"] for one in told(steered)) > 1  # they are asked together


def test_batches_are_no_larger_than_they_may_be(follow: str) -> None:
    log = run({"profile": follow, "batch_size": 3})
    assert {one["batch"] for one in told(log)} == {3}
    assert replies(log) == of_engine(FOLLOW)


def test_generation_settings_are_obeyed() -> None:
    whole = of_engine(None)
    short = run(max_tokens=2)
    assert all(a.startswith(b) for a, b in zip(whole, replies(short), strict=True))
    assert {sample.output.stop_reason for sample in short.samples or []} == {"max_tokens"}
    cut = run(stop_seqs=[" of", " is"])
    assert replies(cut) == [reply.split(" is")[0].split(" of")[0] for reply in whole]
    assert {sample.output.stop_reason for sample in cut.samples or []} == {"stop"}
    once, again, other = (run(temperature=1.5, seed=seed, limit=6) for seed in (1, 1, 2))
    assert replies(once) == replies(again) != replies(other)
    assert {(one["batch"], one["seed"]) for one in told(once)} == {(1, 1)}
    sampled = told(run(temperature=1.5, limit=6))
    assert all(one["seed"] is not None for one in sampled)


def test_chat_options_reach_the_template(model_folder: Path, follow: str) -> None:
    model = get_model(f"moesteer/{model_folder}", chat_option="opening=Yes")
    asked = []
    api: Any = model.api
    api._engine.generate = lambda prompts, *a, **k: asked.extend(prompts) or _none(prompts)
    task = Task([Sample("Tell me.")], solver=generate())
    evaluate(task, model=model, display="none", log_dir="logs")
    assert asked == ["<|user|>Tell me.<|end|><|assistant|>Yes"]


def _none(prompts: list[str]) -> Any:
    from moesteer.engines.base import Generation

    return Generation(["" for _ in prompts], [])


def test_inspects_cache_keeps_profiles_apart(
    follow: str, in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSPECT_CACHE_DIR", str(in_tmp_path / "cache"))
    plain, steered, again = (run(args, cache=True) for args in ({}, {"profile": follow}, {}))
    assert list((in_tmp_path / "cache").rglob("*"))
    assert (accuracy(plain), accuracy(steered), accuracy(again)) == (0.5, 1.0, 0.5)


def test_models_that_differ_in_their_profile_share_the_weights(follow: str) -> None:
    arguments: list[dict[str, Any]] = [{}, {"profile": follow}, {"dtype": "float32"}]
    apis: list[Any] = [
        get_model("moesteer/testbed", memoize=False, **given).api for given in arguments
    ]
    plain, steered, precise = apis
    assert plain._engine is steered._engine
    assert plain._engine is not precise._engine
    assert len({api.connection_key() for api in apis}) == 3


def test_a_batch_that_was_not_steered_fails(follow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A router that goes its own way: the experts see others than the profile says."""

    def escaped(self: Any) -> list[tuple[Profile, LayerEvidence]]:
        return [(FOLLOW, LayerEvidence("follow", 1, 5, {9: 4, 11: 5}, {}))]

    monkeypatch.setattr("moesteer.engines.transformers.steering.Steering._seen", escaped)
    log = run({"profile": follow}, limit=1)
    assert log.status == "error"
    assert log.error is not None
    assert "did not fire in layer 1: activated expert 9 was selected by 4 of 5" in log.error.message


@tool
def adding() -> Tool:
    async def execute(x: int, y: int) -> int:
        """Add.

        Args:
            x: One number.
            y: The other.
        """
        return x + y

    return execute


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": following(solver=[use_tools(adding()), generate()])}, "adding can't be called"),
        ({"top_p": 0.5}, "don't do top_p"),
        ({"max_tokens": 999}, "and a reply of 999 exceed the model's context of 256"),
        (
            {
                "task": Task(
                    [Sample([ChatMessageUser(content="a"), ChatMessageAssistant(content="b")])]
                )
            },
            "the last message is the assistant's already",
        ),
        (
            {
                "task": Task(
                    [
                        Sample(
                            [
                                ChatMessageUser(
                                    content=[ContentImage(image="data:image/png;base64,AA==")]
                                )
                            ]
                        )
                    ]
                )
            },
            "read text only, and here is image",
        ),
    ],
    ids=["tool", "top_p", "length", "assistant", "image"],
)
def test_what_it_can_not_do_is_refused(options: dict[str, Any], message: str) -> None:
    log = run(limit=1, **options)
    assert log.status == "error"
    assert log.error is not None
    assert message in log.error.message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"profile": "none.safetensors"}, "no such profile file"),
        ({"dose": 1}, "no model argument 'dose'; there are profile, batch_size, engine"),
        ({"batch_size": 0}, "batch-size is 0"),
        ({"device": "cpu", "engine": "vllm"}, "--device is for transformers"),
    ],
)
def test_wrong_model_arguments_are_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MoesteerError, match=message):
        get_model("moesteer/testbed", memoize=False, **arguments)
