"""`moesteer reproduce` as a user meets it: whole roads on bundled models, in small, and on a model
of one of the papers' shapes, made at random."""

import json
from pathlib import Path

import pytest

from as_user import Run
from conftest import write_model
from moesteer.directions.writers import Writers
from moesteer.engines.transformers_engine import TransformersEngine
from moesteer.evaluation.comparison import Comparison
from moesteer.evaluation.direction_search import DirectionResult
from moesteer.evaluation.search import SearchResult
from moesteer.profile import Profile
from moesteer.rationale.summary import Summary
from moesteer.reproduce.outcome import Reproduction, Table

# A warning of ours is a line on standard error here, as it is for the user.
pytestmark = pytest.mark.filterwarnings("always::moesteer.errors.MoesteerWarning")


def outcome() -> Reproduction:
    return Reproduction.from_json(Path("out/summary.json").read_text())


def compared(folder: str) -> Comparison:
    return Comparison.from_json(Path(f"out/{folder}/summary.json").read_text())


def nothing_is_asked_again(run: Run, *command: str) -> None:
    """The same command once more generates nothing, and says the same."""
    before, tables = outcome(), Path("out/tables.md").read_text()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("asked again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformersEngine, "generate", never)
        said = run(*command)
    assert said.code == 0
    assert outcome() == before
    assert Path("out/tables.md").read_text() == tables


def shares_agree(table: Table, comparison: Comparison) -> None:
    """A table of outcomes holds what the run's own summary says."""
    for task in comparison.tasks:
        for arm in ("unsteered", "steered"):
            share = comparison.share(task.name, arm)
            cell = table.cell(task.name, arm)
            assert (cell.value, cell.low, cell.high) == (share.share, share.low, share.high)
        change = comparison.difference(task.name, "steered", "unsteered")
        cell = table.cell(task.name, "steered − unsteered")
        assert (cell.value, cell.low, cell.high) == (change.difference, change.low, change.high)


# -- whole roads on bundled models ---------------------------------------------------------------


def test_steermoe_on_the_testbed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from moesteer.evaluation import search
    from moesteer.reproduce.steermoe import road as steermoe

    monkeypatch.setattr(steermoe, "SMALL", steermoe.Sizes(limit=4, seeds=1, budget=3))
    # To be quick.
    monkeypatch.setattr(search, "DOSES", (1,))
    few = {
        "document": (("testbed-document",), ("testbed-fluency",)),
        "refusal": (("testbed-restricted",), ("testbed-benign",)),
    }
    monkeypatch.setattr(steermoe, "STAND_INS", few)
    command = "reproduce steermoe --model testbed --out out".split()

    # Interrupted in the middle, it goes on from there.
    generate, left = TransformersEngine.generate, [30]

    def impatient(self: TransformersEngine, *args, **kwargs):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return generate(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformersEngine, "generate", impatient)
        cut = run(*command)
    assert cut.code == 130
    assert "Started again, it goes on from there." in cut.err
    assert not Path("out/tables.md").exists()

    said = run(*command)
    assert said.code == 0
    result = outcome()
    assert [one.step for one in result.not_run] == ["through a prompt template (away from safe)"]
    for title, folder in (
        ("Towards faithful", "towards-faithful"),
        ("Towards safe", "towards-safe"),
        ("Away from safe", "away-from-safe"),
    ):
        shares_agree(result.table(title), compared(folder))
    scores = Profile.load("out/refusal.risk-difference.safetensors")
    assert scores.scores is not None
    largest = abs(scores.scores.value).max()
    rows = {
        row[0].text.partition(":")[0]: row[1] for row in result.table("Experts of refusal").rows
    }
    assert rows["largest |Δ|"].value == pytest.approx(largest)
    found = SearchResult.from_json(Path("out/towards-faithful-numbers/summary.json").read_text())
    row = result.table("How the numbers were chosen").cell("towards faithful", "found, dev")
    assert row.value == found.best.values["testbed-document"]
    used = Profile.load("out/towards-faithful.safetensors")
    assert used.rule == "paper"
    assert (len(used.activated), len(used.deactivated)) == (
        found.best.activate,
        found.best.deactivate,
    )
    ablation, arms = (
        result.table("Detectors, counts and selection"),
        compared("detectors-and-counts"),
    )
    for row in ablation.rows[1:9]:
        detector, count = row[0].text, int(row[1].value or 0)
        main = (detector, count) == ("risk-difference", 5)
        arm = "steered" if main else f"{detector}, {count} deactivated"
        assert row[2].value == arms.share("testbed-document", arm).share
    assert [int(row[1].value or 0) for row in ablation.rows[1:9]] == [1, 2, 5, 10] * 2

    # Plainly the testbed's, and beside none of the paper's figures.
    markdown = Path("out/tables.md").read_text()
    assert "Its numbers say nothing about real models" in said.out
    assert "Its numbers say nothing about real models" in markdown
    measured, _, reported = markdown.partition("## What the paper reports")
    for figure in ("+27", "+20", "−41", "86, 93", "about 6×"):
        assert figure not in measured
        assert figure in reported
    assert not any("paper" in table.headings for table in result.tables)
    assert said.out.index("will be run:") < said.out.index("The paper's claims")
    assert all((Path("out") / name).exists() for name in ("report.html", *result.runs))


def test_expert_refusal_on_the_testbed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from moesteer.evaluation import direction_search
    from moesteer.reproduce.expert_refusal import plan, road

    small = plan.Sizes(fit=16, validate=8, limit=6, seeds=1, budget=2)
    monkeypatch.setattr(road, "SMALL", small)
    monkeypatch.setattr(direction_search, "WEIGHTED", (7.5, 17))
    monkeypatch.delitem(plan.METHODS, "two")  # to be quick
    command = "reproduce expert-refusal --model testbed --out out".split()
    said = run(*command)
    assert said.code == 0
    result = outcome()
    assert result.model == "testbed-expert"
    assert [one.step.partition(":")[0] for one in result.not_run] == ["capability"]
    assert "moesteer lm-eval MODEL --with OUT/away-from-refusal-method-one" in said.out

    outcomes = result.table("Refusal direction: three outcomes")
    out = compared("projected-out").share("testbed-restricted", "steered").outcomes
    row = ("testbed-restricted", "refusal direction projected out")
    for heading, name in (("refusal", "refused"), ("full answer", "answered")):
        assert outcomes.cell(row[0], heading, row[1]).value == out[name] / 6
    written = Writers.from_json(Path("out/writers/summary.json").read_text())
    parts = result.table("Who writes the refusal direction")
    assert [row[1].value for row in parts.rows] == [part.value for part in written.parts]
    # The planted writer is an expert: the attention of this model writes nothing of it.
    shares = {row[0].text: row[2].value for row in parts.rows}
    assert shares["routed experts"] == pytest.approx(1, abs=0.05)

    routing = result.table("Refusal-specific routing")
    kept = [row[0].text for row in routing.rows if row[4].text == "kept"]
    assert "layer 2, expert 14" in kept
    assert all((row[3].value or 0) >= 0.15 for row in routing.rows if row[4].text == "kept")
    searches = result.table("Searches among directions of experts")
    for way in ("away-from-refusal", "towards-refusal"):
        path = Path(f"out/{way}-method-one/summary.json")
        search = DirectionResult.from_json(path.read_text())
        name = f"{way.replace('-', ' ')}, a single expert"
        assert searches.cell(name, "log-odds", "found").value == search.best.score
        assert searches.cell(name, "log-odds", "control 0").value == (
            search.controls[0].best and search.controls[0].best.score
        )
    # A direction of experts is measured by what it was aimed at, not by what it breaks.
    against = result.table("Experts against the refusal direction")
    test = DirectionResult.from_json(
        Path("out/towards-refusal-method-one/summary.json").read_text()
    ).test
    change = test.difference("testbed-benign", "steered", "unsteered").difference
    assert against.cell("towards refusal, a single expert", "experts").value == change


def test_rationales_on_the_testbed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from moesteer.reproduce import rationales

    small = rationales.Sizes(limit=4, train=16, measured=4, epochs=1, seeds=1, full=True, rate=3e-4)
    monkeypatch.setattr(rationales, "SMALL", small)
    command = "reproduce rationales --model testbed --out out".split()
    said = run(*command)
    assert said.code == 0
    result = outcome()
    assert (result.model, result.not_run) == ("testbed-reader", ())
    assert said.out.index("Labels of inference") < said.out.index("Rationales of inference")
    for name in ("inference", "claims", "biographies"):
        summary = Summary.from_json(Path(f"out/{name}/summary.json").read_text())
        arm = summary.arm("unsteered")
        accuracy = result.table(f"Labels of {name}").cell("labelled rightly", "measured")
        assert (accuracy.value, accuracy.low) == (arm.accuracy, arm.low)
        table = result.table(f"Rationales of {name}")
        for method in ("attention-mean", "saliency-l2", "input-x-gradient", "unbound", "random"):
            for measure, heading in (("f1", "F1"), ("flip", "flip rate")):
                mean = summary.mean("unsteered", method, measure)
                assert mean is not None
                assert table.cell(method, heading).value == mean.value
    lines = Path("out/inference-finetuned/epochs.jsonl").read_text().splitlines()
    epochs = [Summary.from_json(json.dumps(json.loads(line)["summary"])) for line in lines]
    table = result.table("Epochs on inference")
    assert [row[1].value for row in table.rows] == [s.arm("unsteered").accuracy for s in epochs]
    f1 = [s.mean("unsteered", "saliency-l2", "f1") for s in epochs]
    column = table.headings.index("saliency-l2, F1")
    assert [row[column].value for row in table.rows] == [mean and mean.value for mean in f1]
    nothing_is_asked_again(run, *command)


# -- a model of one's own ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the shape of the paper's Qwen3-30B-A3B, and narrow everywhere else."""
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("models") / "Qwen3-30B-A3B"
    write_model(folder)
    config = Qwen3MoeConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(folder)),
        num_hidden_layers=48,
        num_experts=128,
        num_experts_per_tok=8,
        hidden_size=8,
        num_attention_heads=1,
        num_key_value_heads=1,
        intermediate_size=8,
        moe_intermediate_size=4,
        max_position_embeddings=256,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


CARD = """
name = "mquake"
title = "In short"
about = "Made for this test."
outcome = "right"
role = "target"
harmless = true
max_new_tokens = 1
[prompts]
source = "mquake.jsonl"
template = "{context} {question}"
needs = "lines."
[[judges]]
kind = "contains"
column = "answer"
"""


def own_data(number: int = 12) -> list[str]:
    """Pairs of a document and questions after one, and what names them on the command line."""
    pairs, asked = [], []
    for n in range(number):
        question = {"role": "user", "content": f"Is it {n}?"}
        document = {"role": "user", "content": f"It is {n}. Is it {n}?"}
        pairs.append({"a": [document], "b": [question], "target": {"last": f"Is it {n}?"}})
        asked.append({"context": f"It is {n}.", "question": f"Is it {n}?", "answer": "e"})
    for name, records in (("pairs", pairs[:4]), ("mquake", asked)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    Path("mine.toml").write_text(CARD)
    return ["--pairs", "document=pairs.jsonl", "--data", "mine.toml=mquake.jsonl"]


def test_the_paper_s_figures_stand_beside_the_measured_ones(
    run: Run, qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moesteer.reproduce.steermoe import road as steermoe

    small = steermoe.Sizes(None, 1, 3)
    monkeypatch.setattr(steermoe, "Sizes", lambda: small)
    data = own_data()
    command = ["reproduce", "steermoe", "--model", str(qwen), "--out", "out", "--limit", "2"]
    said = run(*command, *data)
    assert said.code == 0
    assert "only the first 2 of each set of prompts" in said.out
    result = outcome()
    assert not any(one.failed for one in result.not_run)
    numbers = result.table("Numbers of experts")
    assert numbers.cell("towards faithful", "paper").text == "0/500"
    used = Profile.load("out/towards-faithful.safetensors")
    left_out = int(numbers.cell("towards faithful", "left out").text.partition(",")[0])
    assert len(used.deactivated) + left_out == 500
    faithful = result.table("Towards faithful")
    shares_agree(faithful, compared("towards-faithful"))
    assert faithful.cell("mquake", "paper").text == "–"
    assert "up to +27 points" in faithful.about
    ablation = result.table("Detectors, counts and selection")
    at = ablation.headings.index("paper")
    beside = {(row[0].text, int(row[1].value or 0)): row[at].text for row in ablation.rows}
    assert beside["unsteered", 0] == "81%"
    by_hand = {100: (86, 84), 200: (93, 84), 500: (97, 82), 1000: (97, 78)}
    for count, figures in by_hand.items():
        for detector, figure in zip(("risk-difference", "log-odds"), figures, strict=True):
            assert beside[detector, count] == f"{figure}%"
    assert beside["random", 500] == "–"
    arms = compared("detectors-and-counts")
    assert (
        ablation.cell("log-odds", "right").value
        == arms.share("mquake", "log-odds, 100 deactivated").share
    )

    Path("mquake.jsonl").write_text(Path("mquake.jsonl").read_text() + "\n")
    other = run(*command, *data)
    assert other.code == 2
    assert "begun with other data for mquake than mquake.jsonl" in other.err


def test_a_model_of_the_paper_s_name_and_another_shape_is_told(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moesteer.reproduce.steermoe import road as steermoe

    small = steermoe.Sizes(None, 1, 3)
    monkeypatch.setattr(steermoe, "Sizes", lambda: small)
    folder = write_model(tmp_path / "OLMoE-1B-7B-0125-Instruct")
    command = ["reproduce", "steermoe", "--model", folder, "--out", "out", "--limit", "2"]
    data = own_data()
    assert run(*command, *data[:2]).code == 0
    assert [table.title for table in outcome().tables] == ["Experts of document"]
    assert any(one.step.startswith("mquake ") for one in outcome().not_run)
    assert run(*command, *data).code == 0  # more data, the same folder
    assert not any(one.step.startswith("mquake ") for one in outcome().not_run)
    numbers = outcome().table("Numbers of experts")
    assert "has another shape" in numbers.about
    assert numbers.cell("towards faithful", "paper").text == "–"
    ablation = outcome().table("Detectors, counts and selection")
    assert {row[-1].text for row in ablation.rows} == {"–"}
    assert "its figures are those of Qwen3-30B-A3B on mquake" in ablation.about


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("steermoe --model testbed --data mquake=x", "testbed brings its own tasks and prompts"),
        ("expert-refusal --model testbed-attention --data harmless=x", "leave out harmless=x"),
        ("steermoe --model some/model", "With --model testbed it runs without any data."),
        ("rationales --model some/model", "--data e-snli=FILE"),
        ("expert-refusal --model some/model", "--data restricted=FILE"),
        ("steermoe --model some/model --data mquake", "'mquake' is not TASK=FILE"),
        ("steermoe --model m --pairs document=x document=y", "document is given twice: x and y"),
        ("steermoe --model testbed --limit 0", "--limit is 0"),
        ("rationales --model testbed --engine vllm", "leave out --engine"),
    ],
)
def test_what_cannot_be_reproduced_is_refused(refused: Run, arguments: str, message: str) -> None:
    assert message in refused("reproduce", *arguments.split(), "--out", "out").err


def test_help_needs_nothing_heavy() -> None:
    from as_user import in_own_process

    code = (
        "import sys\nfrom moesteer.cli import overview\nprint(overview())\n"
        "sys.exit(bool({'torch', 'transformers', 'rich'} & set(sys.modules)))"
    )
    said = in_own_process(code=code)
    assert said.returncode == 0
    assert "  reproduce expert-refusal  Walk " in said.stdout
