"""What is gathered: every kind of run, of one model, finished."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from made_runs import (
    ABOUT,
    all_runs,
    detectors_run,
    evaluate_run,
    facts,
    judge_run,
    profile,
    search_run,
)

from moesteer.errors import MoesteerError
from moesteer.model_facts import LayerShape, ModelFacts
from moesteer.report.page import gather
from moesteer.runs import open_run


def test_every_kind_of_run_is_read(tmp_path: Path):
    page = gather(all_runs(tmp_path))
    assert page.model == facts()
    assert [len(page.searches), len(page.detectors), len(page.checks)] == [1, 1, 1]
    # searches bring their own evaluation along, but are themselves what was run
    assert [e.run.folder.name for e in page.evaluations] == ["evaluated", "test", "test"]
    assert [run.kind for run in page.runs] == [
        "search", "direction search", "evaluate", "detectors", "judge", "writers",
        "rationale", "rationale finetune",
    ]  # fmt: skip


def test_the_profile_of_an_evaluation_is_read_whole(tmp_path: Path):
    (evaluation,) = gather([evaluate_run(tmp_path / "run")]).evaluations
    there, made = evaluation.profile, profile()
    assert (there.activated, there.deactivated) == (made.activated, made.deactivated)
    assert there.evidence == made.evidence
    assert there.scores is not None
    assert made.scores is not None
    for key, array in vars(made.scores).items():
        np.testing.assert_array_equal(getattr(there.scores, key), array)


def test_the_same_scores_are_shown_once(tmp_path: Path):
    assert len(gather(all_runs(tmp_path)).profiles) == 1


def test_profiles_that_steer_otherwise_with_the_same_scores_are_both_shown(tmp_path: Path):
    run = evaluate_run(tmp_path / "run")
    replace(profile(), deactivated=()).save(tmp_path / "less.safetensors")
    replace(profile(), activated=(), deactivated=()).save(tmp_path / "none.safetensors")
    page = gather([tmp_path / "none.safetensors", run, tmp_path / "less.safetensors"])
    assert sorted(found.name for found in page.profiles) == ["less.safetensors", "made.safetensors"]
    alone = gather([tmp_path / "none.safetensors"])
    assert [found.name for found in alone.profiles] == ["none.safetensors"]


def test_a_run_named_twice_is_read_once(tmp_path: Path):
    run = evaluate_run(tmp_path / "run")
    assert len(gather([run, str(run), f"{run}/"]).evaluations) == 1


def test_a_searchs_own_test_folder_named_beside_it_is_read_once(tmp_path: Path):
    run = search_run(tmp_path / "run")
    page = gather([run, run / "test"])
    assert len(page.evaluations) == 1


def test_nothing_to_report_is_said():
    with pytest.raises(MoesteerError, match="nothing to report"):
        gather([])


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (facts("other/model", norm=1.5), "router of layer 1 has norm 1 and 1.5"),
        (
            replace(facts("other/model"), family="sigmoid"),
            "routing families are softmax and sigmoid",
        ),
        (replace(facts("other/model"), config_hash="more"), "config hashes are hash and more"),
    ],
)
def test_two_models_are_refused_and_both_are_named(tmp_path: Path, other: ModelFacts, what: str):
    mine = evaluate_run(tmp_path / "mine")
    theirs = evaluate_run(tmp_path / "theirs", model=other)
    with pytest.raises(MoesteerError, match=what) as error:
        gather([mine, theirs])
    for name in ("made/model", "other/model", "mine", "theirs"):
        assert name in str(error.value)


def test_models_of_other_layers_are_refused(tmp_path: Path):
    run = evaluate_run(tmp_path / "run")
    profile(replace(facts("other/model"), layers=(LayerShape(1, 4, 2), LayerShape(3, 4, 1)))).save(
        tmp_path / "other.safetensors"
    )
    with pytest.raises(MoesteerError, match=r"made/model and .* of other/model: their layers"):
        gather([run, tmp_path / "other.safetensors"])


def test_detectors_and_judges_of_another_model_are_refused(tmp_path: Path):
    mine = evaluate_run(tmp_path / "mine")
    with open_run(tmp_path / "judged", "judge", {"model": "other/model"}, ABOUT):
        summary = judge_run(tmp_path / "made") / "summary.json"
        (tmp_path / "judged" / "summary.json").write_text(summary.read_text())
    with pytest.raises(MoesteerError, match=r"made/model .*other/model: their names differ"):
        gather([mine, tmp_path / "judged"])


def test_the_same_weights_under_another_name_are_one_model(tmp_path: Path):
    mine = evaluate_run(tmp_path / "mine")
    theirs = evaluate_run(tmp_path / "theirs", model=facts("copy/of-it"))
    assert len(gather([mine, theirs]).evaluations) == 2


def test_an_unfinished_run_is_refused_with_its_command(tmp_path: Path):
    run = evaluate_run(tmp_path / "run", finished=False)
    with pytest.raises(MoesteerError, match=r"not finished.*moesteer made by-hand"):
        gather([run])


def test_other_kinds_of_runs_are_refused(tmp_path: Path):
    with open_run(tmp_path / "run", "cooking", {"model": asdict(facts())}, ABOUT):
        pass
    with pytest.raises(MoesteerError, match="is a run of `cooking`"):
        gather([tmp_path / "run"])


def test_what_is_neither_run_nor_profile_is_refused(tmp_path: Path):
    with pytest.raises(MoesteerError, match="no run of moesteer"):
        gather([tmp_path])
    with pytest.raises(MoesteerError, match="no such profile"):
        gather([tmp_path / "none.safetensors"])


def test_a_summary_that_lacks_something_is_refused_with_the_place(tmp_path: Path):
    run = detectors_run(tmp_path / "run")
    (run / "summary.json").write_text('{"pairs": 3}')
    with pytest.raises(MoesteerError, match=r"summary\.json: over: Field required"):
        gather([run])


def test_replies_that_are_not_those_of_the_summary_are_refused(tmp_path: Path):
    run = evaluate_run(tmp_path / "run")
    replies = run / "replies.jsonl"
    replies.write_text(replies.read_text().partition("\n")[2])
    with pytest.raises(MoesteerError, match=r"replies.jsonl holds \d+ replies, but summary.json"):
        gather([run])


def test_trials_of_another_form_are_refused(tmp_path: Path):
    run = search_run(tmp_path / "run")
    (run / "trials.jsonl").write_text('{"stage": "search"}\n')
    with pytest.raises(MoesteerError, match=r"trials\.jsonl: .*missing"):
        gather([run])
