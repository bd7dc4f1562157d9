"""What the user brings for tasks: own cards, judges that are missing, prompts kept back."""

from pathlib import Path

import pytest

from moesteer.directions.prompts import read_prompt_set
from moesteer.errors import MoesteerError
from moesteer.evaluation.cards import SHIPPED
from moesteer.reproduce import given, rationales
from moesteer.reproduce.expert_refusal import road as expert_refusal
from moesteer.reproduce.given import given_tasks

NAMES = ("advbench", "fluency", "harmless-100")


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": "p{n}", "goal": "g{n}"}}\n' for n in range(12)))
    return str(path)


def test_a_card_of_one_s_own_stands_for_the_task(prompts: str, tmp_path: Path) -> None:
    shipped = (SHIPPED / "advbench.toml").read_text()
    head, _, _ = shipped.partition("[[judges]]")
    own = tmp_path / "mine.toml"
    judge = 'kind = "contains"\nphrases = ["no"]\noutcome = "safe"\notherwise = "unsafe"\n'
    own.write_text(head.replace("depends_on", "#") + "[[judges]]\n" + judge)
    tasks = given_tasks(NAMES, {str(own): prompts}, ("dev", "test"))
    assert tasks.cards["advbench"].judges[0].kind == "contains"
    assert tasks.files == {"advbench": prompts}
    assert tasks.own == {"advbench"}
    assert set(tasks.missing) == {"fluency", "harmless-100"}
    with pytest.raises(MoesteerError, match="gives prompts for advbench twice"):
        given_tasks(NAMES, {str(own): prompts, "advbench": prompts}, ("test",))
    with pytest.raises(MoesteerError, match=r"mine.toml, the card of advbench, is none of fluency"):
        given_tasks(("fluency",), {str(own): prompts}, ("test",))


def test_a_task_whose_judge_is_missing_is_told(
    prompts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MOESTEER_JUDGE_URL", raising=False)

    def gone(model: str, revision: str | None) -> None:
        raise MoesteerError(f"{model} is nowhere.")

    monkeypatch.setattr(given, "_look_for", gone)
    tasks = given_tasks(NAMES, {"advbench": prompts, "fluency": prompts}, ("test",))
    assert tasks.cards == {}
    assert "meta-llama/Llama-Guard-3-8B is nowhere" in tasks.missing["advbench"]
    assert "MOESTEER_JUDGE_URL" in tasks.missing["fluency"]


# -- the other two papers --------------------------------------------------------------------------


def lines(path: Path, number: int, word: str) -> str:
    path.write_text("".join(f"{word} {n}\n" for n in range(number)))
    return str(path)


@pytest.mark.parametrize(("whole", "found_on"), [(400, 160), (60, 30), (24, 12)])
def test_prompts_to_measure_on_are_kept_back(whole: int, found_on: int, tmp_path: Path) -> None:
    source = lines(tmp_path / "prompts.txt", whole, "cursed")
    parts = expert_refusal.parted(read_prompt_set(source), source, expert_refusal.Sizes())
    first, second = ({prompt.messages[0].content for prompt in part} for part in parts)
    assert len(first) == found_on
    assert len(first | second) == whole
    assert not first & second


@pytest.mark.parametrize(
    ("model", "threshold"),
    [("mistralai/Mixtral-8x7B-Instruct-v0.1", 10), ("openai/gpt-oss-20b", 10), ("my/model", 15)],
)
def test_the_threshold_is_the_paper_s(model: str, threshold: int, tmp_path: Path) -> None:
    road = expert_refusal.road(model, bundled=False)
    assert any(f"kept from {threshold} percentage points" in line for line in road.settings)


def test_too_few_prompts_and_shared_ones_are_refused(tmp_path: Path) -> None:
    few = lines(tmp_path / "few.txt", 23, "cursed")
    with pytest.raises(MoesteerError, match=r"few.txt holds 23 prompts; at least 24"):
        expert_refusal.road("m", bundled=False, data={"restricted": few})
    same = lines(tmp_path / "same.txt", 30, "cursed")
    with pytest.raises(MoesteerError, match="stands in both sets"):
        expert_refusal.road("m", bundled=False, data={"restricted": same, "harmless": same})
    with pytest.raises(MoesteerError, match="--data: mmlu is none of restricted, harmless"):
        expert_refusal.road("m", bundled=False, data={"mmlu": same})


def test_without_prompts_every_step_of_refusal_lacks_them() -> None:
    road = expert_refusal.road("some/model", bundled=False)
    assert road.ready == ()
    assert all("--data restricted=FILE" in one.missing for one in road.not_ready[:4])
    assert "moesteer lm-eval MODEL" in road.not_ready[4].missing


def test_what_rationales_need(tmp_path: Path) -> None:
    road = rationales.road("some/model", bundled=False, data={"fever": "testbed:claims"})
    assert [step.title for step in road.ready] == ["rationales of fever"]
    lacking = {one.step: one.missing for one in road.not_ready}
    assert "--data e-snli=FILE" in lacking["rationales of e-snli"]
    assert "--train fever=FILE" in lacking["fine-tuning on fever"]


@pytest.mark.parametrize(
    ("data", "train", "message"),
    [
        ({"boolq": "x"}, {}, "--data: boolq is none of e-snli, fever, medical-bios"),
        ({}, {"fever": "x"}, "--train names fever, but nothing to measure it on"),
        (
            {"fever": "testbed:claims"},
            {"fever": "testbed:claims"},
            "is to be measured and is trained on",
        ),
    ],
)
def test_what_is_no_data_of_rationales_is_refused(
    data: dict[str, str], train: dict[str, str], message: str
) -> None:
    with pytest.raises(MoesteerError, match=message):
        rationales.road("some/model", bundled=False, data=data, train=train)
