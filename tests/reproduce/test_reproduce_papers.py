"""The papers' figures, typed once more by hand: a slip in a table would be believed."""

import pytest

from moesteer.reproduce.papers import PAPERS, PaperName, read_paper

# layers, experts, k; activated/deactivated towards faithful, towards safe, away from safe
STEERMOE = {
    "gpt-oss-120b": (36, 128, 4, "5/100", "5/0", "0/100"),
    "gpt-oss-20b": (24, 32, 4, "10/50", "5/0", "0/20"),
    "Mixtral-8x7B-Instruct-v0.1": (32, 8, 2, "10/100", "20/0", "20/0"),
    "OLMoE-1B-7B-0125-Instruct": (16, 64, 8, "0/50", "5/0", "10/125"),
    "Phi-3.5-MoE-instruct": (32, 16, 2, "10/75", "5/0", "5/50"),
    "Qwen3-30B-A3B": (48, 128, 8, "0/500", "15/0", "5/480"),
}


def test_steermoe_s_models_and_numbers_of_experts() -> None:
    found = {
        model.name: (
            model.layers,
            model.experts,
            model.top_k,
            *("{}/{}".format(*model.numbers[aim]) for aim in ("faithful", "safe", "unsafe")),
        )
        for model in read_paper("steermoe").models
    }
    assert found == STEERMOE


def test_steermoe_s_detectors_on_mquake() -> None:
    ablation = read_paper("steermoe").ablation
    assert ablation is not None
    assert (ablation.model, ablation.task, ablation.baseline) == ("Qwen3-30B-A3B", "mquake", 81)
    by_count = zip(
        ablation.deactivated,
        ablation.shares["risk-difference"],
        ablation.shares["log-odds"],
        strict=True,
    )
    assert list(by_count) == [(100, 86, 84), (200, 93, 84), (500, 97, 82), (1000, 97, 78)]


@pytest.mark.parametrize(
    ("paper", "key", "figure"),
    [
        ("steermoe", "safe", "up to +20 points"),
        ("steermoe", "faithful", "up to +27 points"),
        ("steermoe", "unsafe", "−41 points"),
        ("steermoe", "unsafe-template", "−100 points"),
        ("steermoe", "spans", "about 6×"),
        ("steermoe", "weakest", "|Δ| = 0.002"),
        ("steermoe", "significant", "70 to 98 % of all experts, by token"),
        ("steermoe", "price", "about 87 %"),
        ("steermoe", "control", ""),
        ("expert-refusal", "single", "about two thirds of the effect"),
        ("expert-refusal", "attention", ""),
    ],
)
def test_figures_of_findings(paper: PaperName, key: str, figure: str) -> None:
    assert read_paper(paper).finding(key).figure == figure


def test_no_figure_of_the_rationales_was_noted() -> None:
    assert {finding.figure for finding in read_paper("rationales").findings} == {""}


def test_settings() -> None:
    steermoe, refusal = read_paper("steermoe"), read_paper("expert-refusal")
    assert steermoe.settings["max_new_tokens"] == 512
    assert steermoe.settings["margin"] == 0.01
    wanted = {
        "fit": 128,
        "validate": 32,
        "last_tokens": 5,
        "threshold": 15,
        "max_kl": 1,
        "smallest_coefficient": 1,
        "largest_coefficient": 400,
        "control_experts": 10,
        "judged_prompts": 25,
        "judged_tokens": 25,
    }
    assert refusal.settings == wanted
    thresholds = {model.name: model.threshold for model in refusal.models}
    assert thresholds == {
        "Mixtral-8x7B-Instruct-v0.1": 10,
        "OLMoE-1B-7B-0924-Instruct": 15,
        "gpt-oss-20b": 10,
    }
    assert read_paper("rationales").settings["epochs"] == 10


def test_settings_that_the_code_takes_from_elsewhere_are_the_paper_s() -> None:
    from moesteer.evaluation.cards import read_card
    from moesteer.evaluation.direction_choices import WEIGHTED
    from moesteer.evaluation.direction_search import MAX_KL, OTHERS, PROMPTS, TOKENS
    from moesteer.reproduce.steermoe.plan import FAITHFULNESS, FOR_FAITHFULNESS, FOR_SAFETY, SAFETY
    from moesteer.rules import MARGIN

    steermoe, refusal = (read_paper(name).settings for name in ("steermoe", "expert-refusal"))
    assert steermoe["margin"] == MARGIN
    for task in (*FAITHFULNESS, *SAFETY, *FOR_FAITHFULNESS, *FOR_SAFETY):
        assert read_card(task).max_new_tokens == steermoe["max_new_tokens"]
    assert (WEIGHTED[0], WEIGHTED[-1]) == (
        refusal["smallest_coefficient"],
        refusal["largest_coefficient"],
    )
    assert (refusal["judged_prompts"], refusal["judged_tokens"]) == (PROMPTS, TOKENS)
    assert (refusal["max_kl"], refusal["control_experts"]) == (MAX_KL, OTHERS)


@pytest.mark.parametrize("name", PAPERS)
def test_every_paper_says_where_its_figures_are_from(name: PaperName) -> None:
    paper = read_paper(name)
    assert paper.arxiv in paper.source
    assert len({finding.key for finding in paper.findings}) == len(paper.findings)


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ("Qwen/Qwen3-30B-A3B", "Qwen3-30B-A3B"),
        ("models/qwen3-30b-a3b/", "Qwen3-30B-A3B"),
        ("Qwen/Qwen3-30B-A3B-FP8", None),
        ("allenai/OLMoE-1B-7B-0924-Instruct", None),
        ("testbed", None),
    ],
)
def test_a_model_is_the_paper_s_by_the_last_part_of_its_name(model: str, found: str | None) -> None:
    known = read_paper("steermoe").model_of(model)
    assert (known and known.name) == found
