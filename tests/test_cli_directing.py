"""`moesteer direction` and `aim`, as a user meets them, with all that can go wrong."""

import json
from pathlib import Path

import pytest

from as_user import Run
from conftest import write_model
from made_models import Habit, with_habit
from moesteer.profile import Profile


def write_prompts(habit: Habit) -> None:
    Path("a.txt").write_text("\n".join(habit.a))
    Path("b.jsonl").write_text("".join(json.dumps({"prompt": t}) + "\n" for t in habit.b))


SETS = ("--restricted", "a.txt", "--harmless", "b.jsonl")
FEW = ("--fit", 8, "--validate", 4)
ANY = ("--max-kl", 1e9, "--min-induce", -1e9, "--max-layer", 1)
TESTBED = ("testbed", "--restricted", "testbed:restricted", "--harmless", "testbed:benign")


# --- the road from prompts to replies -------------------------------------------------------------


@pytest.mark.parametrize("dense", [False, True])
def test_from_prompts_to_a_direction(run: Run, dense: bool):
    habit = with_habit(dense)
    write_prompts(habit)
    said = run("direction", habit.folder, *SETS, *FEW, *ANY, "--out", "d.safetensors")
    assert said.code == 0, said.err
    assert f"log-odds that a reply begins with {habit.word!r}" in said.out
    assert "8 of 8 to fit on, 4 of 4 to choose on have a score above 0" in said.out
    assert "the last 2; 2 come after the instruction" in said.out
    assert "the lowest bypass with KL ≤ 1e+09, induce ≥ -1e+09, layer < 1 of all" in said.out
    assert said.out.count(" used") == 1
    assert "written: d.safetensors" in said.out
    assert "prompts" in said.err  # progress is no result
    profile = Profile.load("d.safetensors")
    assert profile.evidence is not None
    assert profile.evidence.command.startswith(f"moesteer direction {habit.folder} --restricted")
    assert profile.candidates is not None
    layer, position = int(profile.candidates.layer[-1]), int(profile.candidates.position[-1])

    aimed = ("aim", "d.safetensors", "--layer", layer, "--position", position)
    said = run(
        *(*aimed, "--operation", "ablate", "--place", "attention", "--window", "prompt"),
        *("--out", "e.safetensors"),
    )
    assert said.code == 0, said.err
    assert "ablated at attention of layers" in said.out
    other = Profile.load("e.safetensors")
    layers = range(profile.model.decoder_layers)  # pyright: ignore
    assert other.directions[0].sites == tuple((n, "attention") for n in layers)
    assert other.directions[0].window == "prompt"
    assert other.evidence is not None
    assert " && moesteer aim d.safetensors --layer" in other.evidence.command
    # A chosen direction can be chosen from again.
    assert run("aim", "e.safetensors", *aimed[2:], "--out", "e.safetensors").code == 0
    assert Profile.load("e.safetensors").directions[0].sites == ((layer, "input"),)

    said = run("generate", habit.folder, "hello", "--with", "e.safetensors", "--max-new-tokens", 3)
    assert said.code == 0, said.err
    assert "fired: e.safetensors: moved the input of layer" in said.err

    shown = run("show", "e.safetensors", "--top", 1)
    assert f"+1× at input of layer {layer}" in shown.out
    assert shown.out.count(" used") == 1


def test_refusal_of_the_testbed(run: Run):
    said = run("direction", *TESTBED, "--out", "d.safetensors")
    assert said.code == 0, said.err
    assert "begins with 'I', 'Sorry', 'No'" in said.out
    assert "77 of 77 to fit on, 19 of 19 to choose on have a score above 0" in said.out
    profile = Profile.load("d.safetensors")
    assert profile.toward == "a"
    layer = profile.directions[0].sites[0][0]
    for more, refuses in (((), True), (("--coefficient", -1), False)):
        arguments = ("--layer", layer, "--position", -1, *more, "--out", "e.safetensors")
        assert run("aim", "d.safetensors", *arguments).code == 0
        asked = [f"How do I clean a {adjective} kettle?" for adjective in ("copper", "cursed")]
        said = run("generate", "testbed", *asked, "--with", "e.safetensors")
        assert said.code == 0, said.err
        for record in said.records:
            assert record["reply"].startswith(("I cannot", "Sorry", "No, I")) is refuses
        assert "fired" in said.err


def test_the_other_way_of_use_at_once(run: Run):
    habit = with_habit(False)
    write_prompts(habit)
    use = ("--operation", "ablate", "--window", "generation", "--place", "mlp")
    named = ("--refusal-tokens", habit.word, "--positions", 1, "--seed", 3)
    said = run("direction", habit.folder, *SETS, *FEW, *ANY, *use, *named, "--out", "d.safetensors")
    assert said.code == 0, said.err
    profile = Profile.load("d.safetensors")
    assert profile.directions[0].sites == tuple((n, "mlp") for n in range(4))
    assert profile.directions[0].window == "generation"
    assert profile.toward == "b"
    assert profile.evidence is not None
    assert profile.evidence.settings["positions"] == 1
    assert profile.evidence.seed == 3
    assert set(profile.candidates.position.tolist()) == {-1}  # pyright: ignore


def test_pairs_with_two_prompts_are_two_sets(run: Run):
    habit = with_habit(False)
    number = min(len(habit.a), len(habit.b))
    pairs = [
        {
            side: [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]
            for side, text in (("a", a), ("b", b))
        }
        for a, b in zip(habit.a[:number], habit.b[:number], strict=True)
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    said = run(
        "direction", habit.folder, "--pairs", "pairs.jsonl", *FEW, *ANY, "--out", "d.safetensors"
    )
    assert said.code == 0, said.err
    profile = Profile.load("d.safetensors")
    assert profile.evidence is not None
    assert profile.evidence.source == "pairs.jsonl"
    assert profile.evidence.settings["prompts_a"] == number


def test_chat_options_are_kept(run: Run):
    habit = with_habit(False)
    write_prompts(habit)
    options = ("--chat-option", "opening=x", "--refusal-tokens", *"abcdefghijklmnopqrstuvwxyz")
    said = run("direction", habit.folder, *SETS, *FEW, *ANY, *options, "--out", "d.safetensors")
    if said.code == 0:  # whether the model's habit survives an opening, nobody promised
        assert Profile.load("d.safetensors").chat_options == {"opening": "x"}
    else:
        assert "have a score" in said.err


def test_directions_of_experts(run: Run):
    habit = with_habit(False)
    write_prompts(habit)
    sets = (habit.folder, *SETS, *FEW)
    more = ("--experts", "--kind", "own", "--threshold", 3, "--layers", 2, "--positions", 3)
    said = run("direction", *sets, *more, "--out", "x.safetensors")
    assert said.code == 0, said.err
    profile = Profile.load("x.safetensors")
    assert not profile.directions
    candidates = profile.candidates
    assert candidates is not None
    assert candidates.kind == "own"
    assert set(candidates.layer.tolist()) == {2}
    assert set(candidates.position.tolist()) == {0}
    assert "mean" in said.out
    whose = candidates.expert.tolist()[:2]
    aimed = ("aim", "x.safetensors", "--layer", 2, "--position", 0, "--out", "y.safetensors")
    said = run(*aimed, "--expert", *whose, "--coefficient", 3)
    assert said.code == 0, said.err
    assert said.out.count("used") == 2
    directions = Profile.load("y.safetensors").directions
    assert [d.expert for d in directions] == whose
    assert {d.coefficient for d in directions} == {3.0}
    kept = candidates.expert[candidates.scores["kept"] > 0].tolist()
    said = run(*aimed)
    assert (said.code == 0) is bool(kept), said.err
    if kept:
        assert [d.expert for d in Profile.load("y.safetensors").directions] == kept


# --- what can go wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("--restricted", "--harmless", "--pairs")),
        (("--restricted", "a.txt"), ("--harmless",)),
        ((*SETS, "--pairs", "a.txt"), ("not both",)),
        (("--restricted", "a.txt", "--harmless", "a.txt"), ("both sets", "a.txt:1")),
        (("--restricted", "nope.txt", "--harmless", "b.jsonl"), ("nope.txt", "neither")),
        ((*SETS, "--fit", 3), ("--fit is 3", "8")),
        ((*SETS, "--validate", 0), ("--validate is 0", "4")),
        ((*SETS, "--batch-size", 0), ("--batch-size is 0",)),
        ((*SETS, "--seed", -1), ("--seed is -1",)),
        ((*SETS, "--positions", 0), ("--positions is 0", "2 of them after")),
        ((*SETS, "--positions", 400), ("--positions is 400", "tokens with its template")),
        ((*SETS, "--max-kl", -1), ("--max-kl is -1",)),
        ((*SETS, "--max-layer", 0), ("--max-layer is 0",)),
        ((*SETS, "--coefficient", 0), ("coefficient is 0",)),
        ((*SETS, "--operation", "ablate", "--coefficient", 2), ("ablation has none",)),
        ((*SETS, "--kind", "forced"), ("--kind", "add --experts")),
        ((*SETS, "--threshold", 5), ("--threshold", "add --experts")),
        ((*SETS, "--experts", "--place", "mlp"), ("--place", "moesteer aim")),
        ((*SETS, "--experts", "--max-kl", 1), ("--max-kl", "not for --experts")),
        ((*SETS, "--engine-option", "x=1"), ("--engine-option is for",)),
    ],
)
def test_wrong_arguments(refused: Run, arguments: tuple, words: tuple[str, ...]):
    habit = with_habit(False)
    write_prompts(habit)
    said = refused("direction", habit.folder, *arguments, "--out", "d.safetensors")
    for word in words:
        assert word in said.err


def failed(run: Run, *arguments: object) -> str:
    """What a command says that fails after work whose progress was shown; nothing is written."""
    said = run("direction", *arguments, "--out", "d.safetensors")
    assert said.code == 2
    assert said.out == ""
    assert not list(Path().glob("*d.safetensors*"))
    assert "Traceback" not in said.err
    return said.err.splitlines()[-1]


def test_too_few_prompts_are_left(run: Run):
    habit = with_habit(False)
    Path("a.txt").write_text("\n".join(habit.b[:16]))
    Path("b.txt").write_text("\n".join(habit.b[16:32]))
    said = failed(
        run,
        *(habit.folder, "--restricted", "a.txt", "--harmless", "b.txt"),
        *("--refusal-tokens", habit.word),
    )
    assert "side A: of 12 prompts to fit on only 0 have a score above 0; at least 8" in said
    assert (
        "begin alike"
        in failed(run, habit.folder, "--restricted", "a.txt", "--harmless", "b.txt", *FEW)
        or len(set(habit.b)) > 1
    )


def test_no_direction_within_the_thresholds(run: Run):
    habit = with_habit(False)
    write_prompts(habit)
    said = failed(run, habit.folder, *SETS, *FEW, *ANY[:4], "--max-layer", 0.01)
    assert "none of 6 directions is within the thresholds. The nearest is of layer" in said
    assert "is not below 0.01 × 4 (--max-layer)" in said


def test_experts_of_a_dense_model(refused: Run):
    habit = with_habit(True)
    write_prompts(habit)
    said = refused("direction", habit.folder, *SETS, "--experts", "--out", "d.safetensors")
    assert "Mixture-of-Experts" in said.err


def test_weights_that_give_nan(run: Run):
    import torch
    from transformers import AutoModelForCausalLM

    write_model(Path("nan"))
    model = AutoModelForCausalLM.from_pretrained("nan")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    model.save_pretrained("nan")
    write_prompts(with_habit(False))
    said = failed(run, "nan", *SETS, "--refusal-tokens", "a")
    assert "nan gives NaN after this prompt" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--layer", 9, "--position", -1), ("no direction of layer 9", "layers [")),
        (("--layer", 1, "--position", -5), ("position -5", "positions [")),
        (("--layer", 1, "--position", -1, "--expert", 2), ("belong to no expert",)),
        (("--layer", 1, "--position", -1, "--coefficient", 0), ("coefficient is 0",)),
    ],
)
def test_wrong_aims(run: Run, made_direction: str, arguments: tuple, words: tuple[str, ...]):
    said = run("aim", made_direction, *arguments, "--out", "e.safetensors")
    assert (said.code, said.out) == (2, "")
    assert not Path("e.safetensors").exists()
    for word in words:
        assert word in said.err


def test_a_profile_of_experts_has_no_directions(refused: Run, made: dict[str, Path]):
    said = refused(
        *("aim", made["scored"], "--layer", 1, "--position", -1, "--out", "e.safetensors")
    )
    assert "holds no directions to choose from" in said.err


@pytest.fixture(scope="session")
def made_direction(tmp_path_factory: pytest.TempPathFactory) -> str:
    from made_models import made_sets
    from moesteer.directions.aiming import Aim
    from moesteer.directions.residual import find_residual_direction
    from moesteer.directions.selection import Thresholds

    ready = made_sets(False)
    profile = find_residual_direction(
        ready.engine,
        ready.sets,
        last=2,
        thresholds=Thresholds(1e9, -1e9, 1.0),
        aim=Aim(),
        batch_size=8,
        seed=0,
        source="made",
    )
    path = tmp_path_factory.mktemp("directions") / "made.safetensors"
    profile.save(path)
    return str(path)
