"""The commands that find experts, as a user meets them, with all that can go wrong."""

import gzip
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from as_user import RANKING, Run
from conftest import write_model
from moesteer.direction import Direction
from moesteer.profile import Profile

# --- the road from pairs to replies ---------------------------------------------------------------


def test_from_pairs_to_replies(run: Run, model_folder: Path, pairs_file: Path):
    said = run("detect", model_folder, "--pairs", pairs_file, "--out", "all.safetensors")
    assert said.code == 0
    assert "written: all.safetensors" in said.out
    assert "tokens" in said.err  # progress is no result
    assert Profile.load("all.safetensors").activated == ()

    command = ("--activate", 2, "--deactivate", 3, "--toward", "a")
    assert run("select", "all.safetensors", *command, "--out", "some.safetensors").code == 0
    said = run(
        *("detect", model_folder, "--pairs", pairs_file, *command, "--out", "at-once.safetensors")
    )
    assert said.code == 0
    chosen, at_once = Profile.load("some.safetensors"), Profile.load("at-once.safetensors")
    assert len(chosen.activated) == 2
    assert len(chosen.deactivated) == 3
    assert (at_once.activated, at_once.deactivated) == (chosen.activated, chosen.deactivated)
    assert chosen.toward == at_once.toward == "a"

    shown = run("show", "some.safetensors", "--top", 3)
    assert shown.code == 0
    layer, expert = sorted(chosen.activated)[0]
    assert f"layer {layer}: {expert}" in shown.out
    assert "12 from" in shown.out
    assert shown.out.count("activated") >= 2
    as_json = json.loads(run("show", "some.safetensors", "--json").out)
    assert as_json["activated"] == [list(expert) for expert in chosen.activated]
    assert as_json["deactivated"] == [list(expert) for expert in chosen.deactivated]
    assert as_json["evidence"]["pairs"] == 12
    assert len(as_json["scores"]) == 4 * 8

    said = run(
        "generate", model_folder, "hello", "--with", "some.safetensors", "--max-new-tokens", 3
    )
    assert said.code == 0
    (record,) = said.records
    assert record["prompt"] == "hello"
    assert record["profile"] == "some.safetensors"
    assert "fired" in said.err
    assert sorted(p.name for p in Path().iterdir()) == [
        "all.safetensors",
        "at-once.safetensors",
        "pairs.jsonl",
        "some.safetensors",
    ]  # no lock and no checkpoint remains


def test_detection_is_reproducible(run: Run, model_folder: Path, pairs_file: Path):
    for out in ("one", "two"):
        run("detect", model_folder, "--pairs", pairs_file, "--out", out)
    one, two = (json.loads(run("show", out, "--json").out)["scores"] for out in ("one", "two"))
    assert one == two


def test_detection_counts_what_the_router_chose(run: Run, model_folder: Path, pairs_file: Path):
    # Against transformers' own record of the router's logits, token by token.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run("detect", model_folder, "--pairs", pairs_file, "--out", "p")
    scores = Profile.load("p").scores
    assert scores is not None
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rates = []
    for side in ("a", "b"):
        selected, tokens = np.zeros((4, 8)), 0
        for line in pairs_file.read_text().splitlines():
            pair = json.loads(line)
            before = f"<|user|>{pair['prompt']}<|end|><|assistant|>"
            prefix, reply = (tokenizer(t).input_ids for t in (before, pair[side]))
            ids = [*prefix, *reply, *tokenizer("<|end|>").input_ids]
            with torch.no_grad():
                logits = model(torch.tensor([ids]), output_router_logits=True).router_logits
            tokens += len(reply)
            for layer, of_layer in enumerate(logits):
                for chosen in of_layer.topk(3).indices[len(prefix) : len(prefix) + len(reply)]:
                    selected[layer, chosen.numpy()] += 1
        rates.append(selected / tokens)
    np.testing.assert_allclose(scores.rate_a, rates[0], atol=1e-12)
    np.testing.assert_allclose(scores.value, rates[0] - rates[1], atol=1e-12)


def test_top_1_counts_one_expert_a_token(run: Run, model_folder: Path, pairs_file: Path):
    run("detect", model_folder, "--pairs", pairs_file, "--out", "p", "--detector", "top-1")
    profile = Profile.load("p")
    assert profile.scores is not None
    np.testing.assert_allclose(profile.scores.rate_a.sum(-1), 1)
    assert profile.evidence is not None
    assert profile.evidence.counted == "top-1"


def test_every_detector(run: Run, refused: Run, model_folder: Path, pairs_file: Path):
    from moesteer.detection.detectors import DETECTORS

    listed = run("detect", "--help").out
    for name, detector in DETECTORS.items():
        assert name in listed
        detect = ("detect", model_folder, "--pairs", pairs_file, "--out", name)
        assert run(*detect, "--detector", name).code == 0
        evidence = Profile.load(name).evidence
        assert evidence is not None
        assert (evidence.detector, evidence.counted) == (name, detector.counted)
        assert detector.title in run("show", name).out
    said = refused("detect", "no-model", "--pairs", "p", "--out", "p", "--detector", "magic")
    assert "no detector 'magic'" in said.err
    assert ", ".join(DETECTORS) in said.err


def test_matched_spans(run: Run, model_folder: Path, pairs_file: Path):
    detect = ("detect", model_folder, "--pairs", pairs_file, "--out")
    assert run(*detect, "given").code == 0
    assert run(*detect, "matched", "--match-spans").code == 0
    given, matched = (Profile.load(name).evidence for name in ("given", "matched"))
    assert given is not None
    assert matched is not None
    assert (given.spans, matched.spans) == ("as given", "matched")
    assert given.tokens_a != given.tokens_b
    assert matched.tokens_a == matched.tokens_b <= min(given.tokens_a, given.tokens_b)
    assert "matched in length and position" in run("show", "matched").out
    assert "matched in length" not in run("show", "given").out


@pytest.mark.filterwarnings("default")
def test_sides_of_very_unequal_length_are_warned_of(run: Run, model_folder: Path):
    pair = {"prompt": "How?", "a": "No.", "b": "First you do this, then you do that, and so on."}
    Path("pairs.jsonl").write_text(json.dumps(pair) + "\n")
    detect = ("detect", model_folder, "--pairs", "pairs.jsonl", "--out", "p")
    assert "moesteer: warning: the targets are 2 tokens of A and 47 of B" in run(*detect).err
    assert "warning" not in run(*detect, "--match-spans").err


def test_what_is_shown_of_certainty(run: Run, model_folder: Path, pairs_file: Path):
    run("detect", model_folder, "--pairs", pairs_file, "--out", "p")
    profile = Profile.load("p")
    assert profile.scores is not None
    assert profile.evidence is not None
    shown = run("show", "p", "--top", 40).out
    found = int((profile.scores.q < 0.05).sum())
    assert f"{found} of 32 experts differ between the sides (q < 0.05)" in shown
    assert f"rank correlation of split halves {profile.evidence.stability:.2f}" in shown
    said = json.loads(run("show", "p", "--json").out)
    assert said["evidence"]["stability"] == profile.evidence.stability
    for expert in said["scores"]:
        place = expert["layer"], expert["expert"]
        assert expert["p"] == profile.scores.p[place]
        assert expert["q"] == profile.scores.q[place]


def test_built_in_pairs_and_chat_options(run: Run, model_folder: Path):
    arguments = ("--pairs", "testbed:refusal:dev", "--chat-option", "opening=Well", "--out", "p")
    assert run("detect", model_folder, *arguments).code == 0
    profile = Profile.load("p")
    evidence = profile.evidence
    assert evidence is not None
    assert evidence.source == "testbed:refusal:dev"
    assert profile.chat_options == {"opening": "Well"}
    assert evidence.pairs > 10


# --- pairs ----------------------------------------------------------------------------------------


def test_pairs_refusal(run: Run):
    Path("asked.jsonl").write_text('{"prompt": "How?", "reply": "So."}\n')
    Path("no.txt").write_text("Never.\n")
    assert run("pairs", "refusal", "asked.jsonl", "--out", "p", "--refusals", "no.txt").code == 0
    (pair,) = [json.loads(line) for line in Path("p").read_text().splitlines()]
    assert (pair["a"], pair["b"]) == ("Never.", "So.")


def test_pairs_document(run: Run, model_folder: Path):
    Path("asked.csv").write_text("document,question\nThe sky is green.,What is green?\n")
    assert run("pairs", "document", "asked.csv", "--out", "p.jsonl").code == 0
    assert run("detect", model_folder, "--pairs", "p.jsonl", "--out", "p").code == 0
    evidence = Profile.load("p").evidence
    assert evidence is not None
    assert evidence.tokens_a == evidence.tokens_b  # only the question counts
    assert "–" in run("show", "p").out  # no interval from one pair


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "pairs.jsonl: holds no records"),
        ('{"prompt": "x", "a": "y", "b": "z"}\n{"prompt": "x"\n', "pairs.jsonl:2: not JSON"),
        ('\n{"prompt": "x", "a": "y"}\n', "pairs.jsonl:2: missing key 'b'"),
        ('{"prompt": "x", "a": "y", "b": ""}\n', "pairs.jsonl:1: b holds no visible character"),
        ('{"prompt": "x", "a": "y", "b": "y"}\n', "pairs.jsonl:1: a and b are the same"),
        ('["x"]\n', "pairs.jsonl:1: not an object"),
        (
            '{"prompt": "x", "a": "y", "b": "z", "target": "q"}\n',
            "pairs.jsonl:1: side a: the target text 'q' does not occur",
        ),
    ],
)
def test_pairs_that_are_none(refused: Run, model_folder: Path, content: str, said: str):
    Path("pairs.jsonl").write_text(content)
    assert said in refused("detect", model_folder, "--pairs", "pairs.jsonl", "--out", "p").err


def test_no_pairs_file(refused: Run, model_folder: Path):
    said = refused("detect", model_folder, "--pairs", "nope.jsonl", "--out", "p")
    assert "nope.jsonl: neither an existing file nor a data set" in said.err
    said = refused("detect", model_folder, "--pairs", "testbed:nope", "--out", "p")
    assert "refusal, document, digits" in said.err
    assert "missing key 'reply'" in refused(*make_one_sided(), "--out", "p").err


def make_one_sided() -> tuple[str, ...]:
    Path("asked.jsonl").write_text('{"prompt": "How?"}\n')
    return "pairs", "refusal", "asked.jsonl"


def test_a_reply_over_the_context_length(refused: Run, model_folder: Path):
    pair = {"prompt": "x", "a": "yes " * 2000, "b": "no"}
    Path("pairs.jsonl").write_text(json.dumps(pair))
    said = refused("detect", model_folder, "--pairs", "pairs.jsonl", "--out", "p")
    assert "pairs.jsonl:1: side a: the target ends at token" in said.err
    assert "limit of 2560 tokens" in said.err


# --- choosing and showing -------------------------------------------------------------------------


def test_more_experts_than_there_are(refused: Run, made: dict[str, Path]):
    base = ("select", made["scored"], "--out", "p", "--toward", "b")
    assert "have a score of that sign" in refused(*base, "--activate", 40).err
    assert "can't be negative" in refused(*base, "--activate", -1).err
    said = refused(*base, "--activate", 12)
    assert "experts are activated in layer" in said.err
    assert "k = 3" in said.err


def test_no_side_to_steer_toward(refused: Run, model_folder: Path, pairs_file: Path):
    said = refused("detect", model_folder, "--pairs", pairs_file, "--out", "p", "--activate", 1)
    assert "--activate" in said.err
    assert "--toward" in said.err
    refused("detect", model_folder, "--pairs", pairs_file, "--out", "p", "--toward", "a")


def test_import_ranking(run: Run, refused: Run):
    assert run("import-ranking", RANKING, "--top-k", 1, "--out", "r").code == 0
    assert run("select", "r", "--activate", 1, "--toward", "b", "--out", "b").code == 0
    assert json.loads(run("show", "b", "--json").out)["activated"] == [[3, 0]]
    assert "+0.550 … +0.550" not in run("show", "r").out  # there is no interval to show
    assert "--top-k is 7" in refused("import-ranking", RANKING, "--top-k", 7, "--out", "x").err


def test_a_hostile_ranking_runs_nothing(refused: Run):
    class Hostile:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, ("touch ran",)

    Path("bad.pkl").write_bytes(pickle.dumps(Hostile()))
    Path("bad.pkl.gz").write_bytes(gzip.compress(pickle.dumps(Hostile())))
    for name in ("bad.pkl", "bad.pkl.gz"):
        said = refused("import-ranking", name, "--top-k", 1, "--out", "p")
        assert "system" in said.err
    assert not Path("ran").exists()


@pytest.fixture
def damaged(made: dict[str, Path], in_tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the profile with something wrong."""

    def damage(what: str) -> Path:
        path = in_tmp_path / f"{what}.safetensors"
        if what == "truncated":
            path.write_bytes(made["chosen"].read_bytes()[:-100])
            return path
        with safe_open(made["chosen"], framework="numpy") as file:
            header = json.loads(file.metadata()["moesteer"])
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        match what:
            case "schema":
                header["schema"] = 99
            case "nan":
                arrays["value"][1, 2] = np.nan
            case "layer":
                header["activated"] = [[17, 0]]
            case "expert":
                header["activated"] = [[1, 8]]
            case "surplus":
                header |= {"activated": [[1, e] for e in range(4)], "deactivated": []}
            case "both":
                header["deactivated"] = header["activated"]
            case "config":
                header["model"]["config_hash"] = "0123"
        save_file(arrays, path, metadata={"moesteer": json.dumps(header)})
        return path

    return damage


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("truncated", ("not a readable profile",)),
        ("schema", ("schema 99", "reads schema 3")),
        ("nan", ("value of expert (1, 2) is nan",)),
        ("layer", ("layer 17", "0–3")),
        ("expert", ("(1, 8) does not exist", "0–7")),
        ("surplus", ("4 experts are activated in layer 1 (0, 1, 2, 3)", "k = 3")),
        ("both", ("both activated and deactivated",)),
    ],
)
@pytest.mark.parametrize("command", ["show", "select", "generate", "chat"])
def test_a_profile_with_something_wrong(
    refused: Run, damaged: Callable[[str], Path], what: str, words: tuple[str, ...], command: str
):
    path = damaged(what)
    arguments = {
        "show": (path, "--json"),
        "select": (path, "--activate", 1, "--toward", "a", "--out", "p"),
        "generate": ("no-model", "hi", "--with", path),  # said before a model is loaded
        "chat": ("no-model", "--with", path),
    }[command]
    said = refused(command, *arguments)
    assert path.name in said.err
    for word in words:
        assert word in said.err


def test_a_profile_of_another_model(
    refused: Run, model_folder: Path, damaged: Callable[[str], Path], tmp_path_factory
):
    for command in (("generate", model_folder, "hi"), ("chat", model_folder)):
        said = refused(*command, "--with", damaged("config"))
        assert "config hash is 0123 in the profile and" in said.err


def test_a_profile_of_another_training_of_the_model(
    refused: Run, made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
):
    other = write_model(tmp_path_factory.mktemp("models") / "other", seed=1)
    said = refused("generate", other, "hi", "--with", made["chosen"])
    assert "has norm" in said.err
    assert "in the profile and" in said.err


def test_what_is_no_profile(refused: Run, model_folder: Path):
    assert "no such profile file" in refused("show", "nope").err
    weights = model_folder / "model.safetensors"
    assert "not a profile of moesteer" in refused("show", weights).err
    assert "not a readable profile" in refused("show", model_folder / "config.json").err


# --- experts and directions in one profile --------------------------------------------------------


def test_profiles_of_both_kinds_combine(run: Run, made: dict[str, Path], model_folder: Path):
    along = Direction((0.5,) * 64, ((2, "input"),), coefficient=-2)
    Profile(directions=(along,)).save("along.safetensors")
    said = run("combine", made["chosen"], "along.safetensors", "--out", "both.safetensors")
    assert said.code == 0
    both, chosen = Profile.load("both.safetensors"), Profile.load(made["chosen"])
    assert (both.activated, both.deactivated) == (chosen.activated, chosen.deactivated)
    assert both.directions == (along,)
    assert "-2× at input of layer 2" in said.out
    asked = ("generate", model_folder, "--max-new-tokens", 3, "Tell me one.")
    (unsteered,), (experts,), (steered,) = (
        run(*asked, *more).records
        for more in ((), ("--with", made["chosen"]), ("--with", "both.safetensors"))
    )
    assert len({unsteered["reply"], experts["reply"], steered["reply"]}) == 3


def test_profiles_that_contradict_do_not_combine(refused: Run, made: dict[str, Path]):
    experts = Profile.load(made["chosen"])
    Profile(deactivated=experts.activated[:1]).save("against.safetensors")
    said = refused("combine", made["chosen"], "against.safetensors", "--out", "both.safetensors")
    assert "both activated and deactivated" in said.err
    assert "nothing to combine" in refused("combine", "--out", "both.safetensors").err
