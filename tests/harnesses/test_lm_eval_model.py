"""The model class: HFLM where nothing is steered, our own engine's numbers where something is."""

import sys
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from made_suites import FOLLOWING, documents, write_suite
from moesteer.direction import Direction, Operation, Window
from moesteer.engines.checkpoint import resolve
from moesteer.engines.readouts import Readout, Term
from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.errors import DidNotFire, MoesteerError
from moesteer.gate import DirectionProbe, Gate
from moesteer.harnesses import lm_eval as harness
from moesteer.harnesses.lm_eval import HFLM, SteeredLM
from moesteer.profile import Profile

simple_evaluate: Any = evaluator.simple_evaluate  # a decorator hides its type
FOLLOW = Profile(activated=FOLLOWING, name="follow")
HIDDEN = 128
"""How wide the testbed's residual stream is."""
TEXTS = [
    ("The market of Thorndale sells", " the ginger."),
    ("A stage play", " says that the square of Ravenwick has the poplar."),
    ("The tower", " is"),
    ("The tower", " was"),
    ("", "The cheese is in the market."),
]


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    """In fp32, so that two ways of computing one number agree closely."""
    return load_transformers("testbed", dtype="float32")


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_suite(tmp_path_factory.mktemp("suite"), 8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def requests(kind: Any, arguments: list[tuple]) -> list[Any]:
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


def answers(lm: Any) -> list[Any]:
    """What a model says to requests of every kind."""
    lines = documents(5)
    spoken = [(line["prompt"], {"until": ["."], "max_gen_toks": 8}) for line in lines]
    return [
        lm.loglikelihood(requests("loglikelihood", TEXTS), disable_tqdm=True),
        lm.loglikelihood_rolling(
            requests("loglikelihood_rolling", [(line["a"],) for line in lines]), disable_tqdm=True
        ),
        lm.generate_until(requests("generate_until", spoken), disable_tqdm=True),
    ]


def test_unsteered_it_is_hflm_bit_for_bit_also_after_steering() -> None:
    theirs = HFLM(resolve("testbed"), device="cpu", batch_size=3)
    ours = SteeredLM("testbed", device="cpu", batch_size=3)
    expected = answers(theirs)
    assert answers(ours) == expected
    ours.steer_by(FOLLOW)
    assert answers(ours) != expected
    ours.steer_by(None)
    assert answers(ours) == expected
    assert ours.evidence == []
    assert ours.told()["profile"] is None


def encoded(lm: SteeredLM, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """By hand: the model begins every text with its <|bos|>, which an empty context is."""
    tokenizer = lm.engine.tokenizer
    bos = (
        [tokenizer.bos_token_id] if tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id else []
    )
    ids = bos + tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    start = len(bos + tokenizer(context, add_special_tokens=False)["input_ids"])
    return ids[:start], ids[start:]


def by_engine(lm: SteeredLM, profile: Profile | None, texts: list[tuple[str, str]]) -> list[float]:
    """Σ log P of each continuation's tokens after its context, by `Engine.read`."""
    readouts = []
    for context, continuation in texts:
        before, after = encoded(lm, context, continuation)
        terms = [Term(len(before) + i, token, 1.0) for i, token in enumerate(after)]
        readouts.append(Readout((*before, *after), tuple(terms)))
    return lm.engine.read(readouts, [profile])[0].tolist()


def direction(window: Window, operation: Operation = "add") -> Profile:
    vector = tuple(float((7 * i) % 5 - 2) for i in range(HIDDEN))
    aimed = Direction(vector, ((1, "mlp"), (2, "input")), operation, 1.0, window)
    return Profile(directions=(aimed,), name=f"{operation} {window}")


@pytest.mark.parametrize(
    "profile",
    [
        FOLLOW,
        Profile(deactivated=FOLLOWING),
        Profile(activated=FOLLOWING, rule="paper", dose=0.5),
        direction("all"),
        direction("all", "ablate"),
        direction("prompt"),
        direction("generation"),
    ],
    ids=lambda profile: f"{profile.name} {profile.rule} {len(profile.deactivated)}",
)
def test_log_likelihoods_are_those_of_the_engine_under_the_same_profile(
    engine: TransformersEngine, profile: Profile
) -> None:
    lm = SteeredLM(engine, profile, batch_size=3)
    texts = TEXTS[:4]
    found = lm.loglikelihood(requests("loglikelihood", texts), disable_tqdm=True)
    expected = by_engine(lm, profile, texts)
    assert [value for value, _ in found] == pytest.approx(expected, abs=2e-4)
    assert expected != pytest.approx(by_engine(lm, None, texts), abs=0.01)  # it does something
    assert all(seen.obeyed or profile.rule == "paper" for seen in lm.evidence)
    assert lm.evidence
    assert lm.evidence[0].tokens > 0


def test_replies_are_those_of_the_engine_under_the_same_profile(
    engine: TransformersEngine,
) -> None:
    lm = SteeredLM(engine, FOLLOW, batch_size=4)
    prompts = [
        lm.apply_chat_template([{"role": "user", "content": line["prompt"]}])
        for line in documents(6)
    ]
    asked = [(prompt, {"until": [" is"], "max_gen_toks": 12}) for prompt in prompts]
    found = lm.generate_until(requests("generate_until", asked), disable_tqdm=True)
    generated = engine.generate(prompts, FOLLOW, max_new_tokens=12)
    assert found == [reply.split(" is")[0] for reply in generated.replies]
    assert found == [line["a"].split(" is")[0] for line in documents(6)]  # as planted
    seen: dict[int, Any] = {line.layer: line for line in lm.evidence}
    assert seen.keys() == {1, 2}
    assert seen[1].activated == {9: seen[1].tokens, 11: seen[1].tokens}


def test_by_its_name_it_runs_lm_evals_tasks_and_tells_that_it_fired(
    suite: Path, tmp_path: Path
) -> None:
    FOLLOW.save(tmp_path / "follow.safetensors")
    manager = TaskManager(include_path=str(suite), include_defaults=False)
    results: Any = simple_evaluate(
        model="moesteer",
        model_args=f"pretrained=testbed,profile={tmp_path}/follow.safetensors",
        tasks=["choice"],
        device="cpu",
        batch_size=4,
        task_manager=manager,
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    assert results["results"]["choice"]["acc,none"] == 1.0
    told = results["config"]["moesteer"]
    assert (told["model"], told["profile"]) == ("testbed", "follow.safetensors")
    assert told["fingerprint"] == FOLLOW.fingerprint
    assert [(seen["layer"], seen["obeyed"]) for seen in told["fired"]] == [(1, True), (2, True)]


def test_the_command_is_lm_evals_own_with_one_model_more(
    suite: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = partialmethod(TaskManager.__init__, include_defaults=False)  # else: 10 s to list them
    monkeypatch.setattr(TaskManager, "__init__", known)
    FOLLOW.save(tmp_path / "follow.safetensors")

    def run(profile: str) -> None:
        command = ["lm_eval", "--model", "moesteer", "--tasks", "spoken", "--batch_size", "4"]
        command += ["--model_args", f"pretrained=testbed,profile={tmp_path}/{profile}"]
        command += ["--include_path", str(suite), "--apply_chat_template", "--limit", "4"]
        monkeypatch.setattr(sys, "argv", command)
        harness.main()

    run("follow.safetensors")
    assert "|exact_match|↑  |    1|" in capsys.readouterr().out.replace("1.0", "1")
    with pytest.raises(SystemExit) as stopped:
        run("none.safetensors")
    assert stopped.value.code == 2
    assert "moesteer: " in capsys.readouterr().err


def test_a_profile_that_does_nothing_to_the_texts_did_not_fire(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    vector = tuple(float(i % 3 - 1) for i in range(HIDDEN))
    later = Direction(vector, ((1, "mlp"),), window="generation")
    lm = SteeredLM(engine, Profile(directions=(later,), name="later"), batch_size=2)
    lm.told()  # nothing was asked yet
    lm.loglikelihood(requests("loglikelihood", [("The tower", " is")]), disable_tqdm=True)
    with pytest.raises(DidNotFire, match="later did not fire"):
        lm.told()
    lm.loglikelihood(requests("loglikelihood", TEXTS[:2]), disable_tqdm=True)
    assert lm.told()["fired"][0]["tokens"] > 0

    lm.steer_by(FOLLOW)
    forward = engine.model.forward
    monkeypatch.setattr(engine.model, "forward", lambda *a, **k: forward(*a, **k))
    with pytest.raises(DidNotFire, match="no token passed"), lm._steered(1):
        pass  # the model is not called


def test_batches_that_are_only_tried_out_are_no_evidence(engine: TransformersEngine) -> None:
    lm = SteeredLM(engine, FOLLOW, batch_size="auto", max_batch_size=2)
    assert lm._detect_batch_size() == 2
    assert lm.evidence == []


def test_a_cache_of_replies_is_of_one_model_and_profile(
    engine: TransformersEngine, suite: Path, tmp_path: Path
) -> None:
    manager = TaskManager(include_path=str(suite), include_defaults=False)

    def accuracy(profile: Profile | None, cache: str) -> float:
        results: Any = simple_evaluate(
            SteeredLM(engine, profile, batch_size=4),
            tasks=["choice"],
            task_manager=manager,
            use_cache=str(tmp_path / cache),
            apply_chat_template=True,
            bootstrap_iters=0,
        )
        return results["results"]["choice"]["acc,none"]

    assert accuracy(None, "unsteered") == accuracy(None, "unsteered") == 0.5
    with pytest.raises(MoesteerError, match=r"replies of .* unsteered.* to be of .* profile"):
        accuracy(FOLLOW, "unsteered")
    assert accuracy(FOLLOW, "steered") == accuracy(FOLLOW, "steered") == 1
    with pytest.raises(MoesteerError, match="mix them up"):
        accuracy(Profile(deactivated=FOLLOWING), "steered")


def test_lm_evals_cache_of_prompts_tells_chat_options_apart(engine: TransformersEngine) -> None:
    plain = SteeredLM(engine)
    thinking = SteeredLM(engine, chat_option="enable_thinking=false;opening=Yes")
    assert thinking.chat_template_args == {"enable_thinking": False, "opening": "Yes"}
    own = SteeredLM(engine, Profile(activated=FOLLOWING, chat_options={"opening": "No"}))
    assert own.chat_template_args == {"opening": "No"}
    names = {lm.tokenizer_name for lm in (plain, thinking, own)}
    assert len(names) == 3
    assert plain.tokenizer_name == HFLM.tokenizer_name.fget(plain)


def test_what_it_can_not_steer_is_refused(engine: TransformersEngine) -> None:
    with pytest.raises(MoesteerError, match="expert \\(1, 99\\) does not exist"):
        SteeredLM(engine, Profile(activated=((1, 99),)))
    with pytest.raises(MoesteerError, match="empty"):
        SteeredLM(engine, Profile(name="empty"))
    unit = (1.0, *[0.0] * (HIDDEN - 1))
    gated = Profile(activated=FOLLOWING, gate=Gate(DirectionProbe(1, -1, unit), 0.0), name="gated")
    with pytest.raises(MoesteerError, match="gated has a gate"):
        SteeredLM(engine, gated)
    with pytest.raises(MoesteerError, match="merge the adapter"):
        SteeredLM("testbed", peft="adapter")


def test_a_model_in_several_processes_is_refused(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HFLM calls the model itself, and the other processes would be waited for for ever."""
    monkeypatch.setattr(engine.model, "_tp_size", 2)
    with pytest.raises(MoesteerError, match="split over 2 processes"):
        SteeredLM(engine)
