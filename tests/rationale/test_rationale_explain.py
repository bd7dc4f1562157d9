"""The whole road on a tiny model: what a reading says is what the model does, step by step."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.errors import MoesteerError, MoesteerWarning
from moesteer.profile import Profile
from moesteer.rationale import explain as explaining
from moesteer.rationale.comparing import compare_runs
from moesteer.rationale.explain import Settings, arms_with, explain, methods_of, readings_of
from moesteer.rationale.instances import parse_instance
from moesteer.rationale.layout import lay_out
from moesteer.rationale.reading import Reading
from moesteer.runs import read_run

LABELS = {"good": "Yes", "bad": "No"}
SETTINGS = Settings(
    ("saliency-l2", "occlusion", "unbound", "top-var-two-turn"), seeds=2, shares=(0.3, 1.0)
)
STEERED = Profile(activated=((1, 2), (2, 5)), toward="a", name="two experts")


def record(number: int) -> dict:
    text = f"Tell me never {number}, sure one."
    return {
        "texts": {"text": text},
        "label": "good" if number % 2 else "bad",
        "labels": LABELS,
        "rationale": [{"text": "text", "start": 5, "end": 13}],
        "prompt": "{text} So?",
    }


INSTANCES = [parse_instance(record(number), f"made:{number}") for number in range(1, 7)]


@pytest.fixture(scope="module")
def engine(model_folder: Path) -> TransformersEngine:
    return load_transformers(str(model_folder), dtype="float32")


@pytest.fixture(scope="module")
def run(engine: TransformersEngine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rationale") / "run"
    explain(engine, INSTANCES, SETTINGS, out=out, arms=arms_with(STEERED, engine.facts.layers, 1))
    return out


@pytest.fixture(scope="module")
def readings(run: Path) -> dict[tuple[str, int], Reading]:
    return {(r.arm, r.item): r for r in readings_of(read_run(run))}


def test_every_instance_is_read_in_every_arm(readings: dict[tuple[str, int], Reading]) -> None:
    arms = ("unsteered", "steered", "random 0")
    assert set(readings) == {(arm, item) for arm in arms for item in range(6)}
    for reading in readings.values():
        assert reading.source == f"made:{reading.item + 1}"
        words = [reading.texts[t][start:end] for t, start, end in reading.units]
        assert words == f"Tell me never {reading.item + 1} sure one".split()
        assert [words[unit] for unit in reading.human] == ["me", "never"]
        scored = {"saliency-l2", "occlusion", "random 0", "random 1"}
        assert set(reading.scores) == set(reading.curve) == scored
        assert set(reading.choices) == scored | {"unbound", "top-var-two-turn"}
        assert set(reading.named) == set(reading.controls) == {"unbound", "top-var-two-turn"}


def size(reading: Reading, units: tuple[int, ...]) -> int:
    return sum(reading.tokens[unit] for unit in units)


def test_choices_are_the_best_units_of_about_as_many_tokens_as_people_marked(
    readings: dict[tuple[str, int], Reading],
) -> None:
    for reading in readings.values():
        marked = size(reading, reading.human)
        for method, scores in reading.scores.items():
            chosen = reading.choices[method].units
            rest = [scores[unit] for unit in range(len(scores)) if unit not in chosen]
            assert min(scores[unit] for unit in chosen) >= max(rest)
            assert abs(size(reading, chosen) - marked) <= max(reading.tokens) / 2
        for way, drawn in reading.controls.items():
            assert len(drawn) == 2
            named = size(reading, reading.choices[way].units)
            for choice in drawn:
                assert bool(choice.units) == bool(named)
                assert abs(size(reading, choice.units) - named) <= max(reading.tokens)


@torch.no_grad()
def label_scores(engine: TransformersEngine, said: str) -> torch.Tensor:
    """By hand: the label's words after a prompt that says this, through the plain model."""
    prompt = f"<|user|>{said} So?<|end|><|assistant|>"
    scores = []
    for words in LABELS.values():
        before, whole = (
            engine.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
            for text in (prompt, prompt + words)
        )
        logs = engine.model(whole).logits[0].log_softmax(-1)
        places = range(before.shape[1], whole.shape[1])
        scores.append(sum(logs[at - 1, whole[0, at]] for at in places))
    return torch.stack(scores)


def probabilities(engine: TransformersEngine, said: str) -> dict[str, float]:
    """Of each label among the labels."""
    return dict(zip(LABELS, label_scores(engine, said).softmax(0).tolist(), strict=True))


def test_labels_are_those_of_the_plain_model(
    engine: TransformersEngine, readings: dict[tuple[str, int], Reading]
) -> None:
    for item, instance in enumerate(INSTANCES):
        reading = readings["unsteered", item]
        expected = probabilities(engine, instance.texts["text"])
        assert reading.probabilities == pytest.approx(expected, abs=1e-5)
        assert reading.predicted == max(expected, key=lambda label: expected[label])
        assert reading.label == instance.label
        mass = label_scores(engine, instance.texts["text"]).exp().sum()
        assert reading.mass == pytest.approx(mass.item(), rel=1e-3)


def test_masking_everything_is_the_same_for_every_method(
    readings: dict[tuple[str, int], Reading],
) -> None:
    for reading in readings.values():
        whole = {curve[1] for curve in reading.curve.values()}  # all units: a share of 1
        assert len(whole) == 1
        assert whole.pop().sufficiency == 0


def test_steering_changes_the_probabilities(readings: dict[tuple[str, int], Reading]) -> None:
    for item in range(6):
        before, after = (readings[arm, item].probabilities for arm in ("unsteered", "steered"))
        assert before != after


def test_an_interrupted_run_goes_on_and_ends_the_same(
    engine: TransformersEngine, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explaining, "SAVED", 2)
    out, arms = tmp_path / "run", arms_with(STEERED, engine.facts.layers, 1)

    def stop(done: int, total: int) -> None:
        assert total == 18
        if done >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        explain(engine, INSTANCES, SETTINGS, out=out, arms=arms, progress=stop)
    kept = (out / "readings.jsonl").read_text().splitlines()
    assert len(kept) == 8
    assert not (out / "summary.json").exists()
    with (out / "readings.jsonl").open("a") as stream:
        stream.write('{"item": 3, "arm"')  # half a line
    done: list[int] = []
    explain(
        engine, INSTANCES, SETTINGS, out=out, arms=arms, progress=lambda n, total: done.append(n)
    )
    assert done == [8, 10, 12, 14, 16, 18]
    assert (out / "readings.jsonl").read_text().splitlines()[:8] == kept
    # In batches of other sizes, sums are rounded otherwise.
    whole, again = (json.loads((folder / "summary.json").read_text()) for folder in (run, out))
    assert again["arms"] == whole["arms"]
    for a, b in zip(again["means"], whole["means"], strict=True):
        assert a["value"] == pytest.approx(b["value"], abs=1e-4)


def test_a_run_of_other_settings_is_refused(engine: TransformersEngine, run: Path) -> None:
    arms = arms_with(STEERED, engine.facts.layers, 1)
    with pytest.raises(MoesteerError, match='pool was "sum" and is "mean" now'):
        explain(engine, INSTANCES, replace(SETTINGS, pool="mean"), out=run, arms=arms)
    with pytest.raises(MoesteerError, match="instances was"):
        explain(engine, INSTANCES[:3], SETTINGS, out=run, arms=arms)
    with pytest.raises(MoesteerError, match=r"arms\.random 0 was"):
        explain(engine, INSTANCES, SETTINGS, out=run)


def test_a_spoilt_line_is_named(engine: TransformersEngine, run: Path, tmp_path: Path) -> None:
    for name in ("run.json", "readings.jsonl"):
        (tmp_path / name).write_text((run / name).read_text())
    lines = (tmp_path / "readings.jsonl").read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | {"probabilities": "high"})
    (tmp_path / "readings.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(MoesteerError, match=r"readings\.jsonl:2: probabilities"):
        readings_of(read_run(tmp_path))


def test_a_reading_that_contradicts_itself_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text((run / "run.json").read_text())
    lines = (run / "readings.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    for change, said in (
        ({"human": [99]}, "does not fit its"),
        ({"tokens": [1]}, "does not fit its"),
        ({"item": json.loads(lines[1])["item"]}, "stands there already"),
    ):
        spoilt = [lines[1], json.dumps(first | change)]
        (tmp_path / "readings.jsonl").write_text("\n".join(spoilt) + "\n")
        with pytest.raises(MoesteerError, match=rf"readings\.jsonl:2: .*{said}"):
            readings_of(read_run(tmp_path))


def test_what_cannot_be_asked_is_refused_before_the_run(
    engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = max(len(one.ids) for one in lay_out(INSTANCES, engine.tokenizer))
    monkeypatch.setattr(engine, "max_tokens", longest + 20)
    settings = replace(SETTINGS, methods=("occlusion", "top-var-two-turn"))
    with pytest.raises(MoesteerError, match=rf"asking for its words .*context of {longest + 20};"):
        explain(engine, INSTANCES, settings, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_method_that_tells_no_words_apart_is_said(
    engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attribute = explaining.attribute

    def flat(*given: Any, **more: Any) -> Any:
        found = attribute(*given, **more)
        scores = [{method: (0.5,) * len(of) for method, of in one.items()} for one in found.scores]
        return replace(found, scores=(scores[0], *found.scores[1:]))

    monkeypatch.setattr(explaining, "attribute", flat)
    settings = replace(SETTINGS, methods=("saliency-l2",))
    with pytest.warns(MoesteerWarning, match="saliency-l2 makes as much of every word in 1 of 3"):
        explain(engine, INSTANCES[:3], settings, out=tmp_path / "run")


def test_the_gap_of_integrated_gradients_is_kept_and_told_again(
    engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attribute = explaining.attribute

    def missed(*given: Any, **more: Any) -> Any:
        found = attribute(*given, **more)
        return replace(found, gaps=(0.3, *found.gaps[1:]))

    monkeypatch.setattr(explaining, "attribute", missed)
    settings = replace(SETTINGS, methods=("saliency-l2",))
    for _ in range(2):  # made, and taken up
        with pytest.warns(MoesteerWarning, match="integrated"):
            explain(engine, INSTANCES[:3], settings, out=tmp_path / "run")
    assert [r.gap for r in readings_of(read_run(tmp_path / "run"))] == [0.3, None, None]


def test_methods(engine: TransformersEngine) -> None:
    by_default = methods_of(engine, None, None)
    assert "gate-x-gradient" in by_default
    assert not {"integrated-gradients", "behaviour-routing"} & set(by_default)
    assert methods_of(engine, ["occlusion", "unbound", "occlusion"], None) == (
        "occlusion",
        "unbound",
    )
    with pytest.raises(MoesteerError, match="no method 'guess'; choose from attention-last"):
        methods_of(engine, ["guess"], None)
    with pytest.raises(MoesteerError, match="needs a profile with scores"):
        methods_of(engine, ["behaviour-routing"], None)


def test_a_method_that_there_is_none_of_is_not_passed_over(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, methods=("occlusion", "oclusion"))
    with pytest.raises(MoesteerError, match="no method 'oclusion'; choose from"):
        explain(engine, INSTANCES, settings, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_calibration_takes_off_what_is_said_without_the_texts(
    engine: TransformersEngine, readings: dict[tuple[str, int], Reading], tmp_path: Path
) -> None:
    settings = replace(SETTINGS, methods=("saliency-l2",), calibrated=True)
    explain(engine, INSTANCES[:2], settings, out=tmp_path / "run")
    empty = probabilities(engine, "N/A")
    for reading in readings_of(read_run(tmp_path / "run")):
        plain = readings["unsteered", reading.item].probabilities
        odds = {label: plain[label] / empty[label] for label in LABELS}
        expected = {label: of / sum(odds.values()) for label, of in odds.items()}
        assert reading.probabilities == pytest.approx(expected, abs=1e-4)


def test_runs_of_the_same_instances_are_compared(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    for name, masking in (("cut", "delete"), ("put", "neutral")):
        settings = replace(SETTINGS, methods=("occlusion",), masking=masking, neutral="e")
        explain(engine, INSTANCES, settings, out=tmp_path / name)
    found = compare_runs([tmp_path / "cut", tmp_path / "put"])
    assert [arm.name for arm in found.arms] == ["cut", "put"]
    flips = {arm.name: found.mean(arm.name, "occlusion", "comprehensiveness") for arm in found.arms}
    cut, put = (mean.value for mean in flips.values() if mean is not None)
    (change,) = [
        c for c in found.changes if c.measure == "comprehensiveness" and c.method[0] == "o"
    ]
    assert (change.arm, change.against) == ("put", "cut")
    assert change.difference == pytest.approx(put - cut)
    explain(engine, INSTANCES[:4], SETTINGS, out=tmp_path / "few")
    with pytest.raises(MoesteerError, match="different instances"):
        compare_runs([tmp_path / "cut", tmp_path / "few"])
    with pytest.raises(MoesteerError, match="two runs are named cut"):
        compare_runs([tmp_path / "cut", tmp_path / "cut"])
    (tmp_path / "few" / "summary.json").unlink()
    with pytest.raises(MoesteerError, match="not finished"):
        compare_runs([tmp_path / "few"])


def test_random_rationales_are_repeated_by_their_seed(
    readings: dict[tuple[str, int], Reading],
) -> None:
    for item in range(6):
        drawn = {readings[arm, item].scores["random 0"] for arm in ("unsteered", "steered")}
        assert len(drawn) == 1
        assert not np.allclose(drawn.pop(), readings["unsteered", item].scores["random 1"])
