"""The model card: metadata that the Hub reads, numbers as they were measured, nothing claimed."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from made_evaluation import evaluation

from made_profiles import MODEL, directed, full
from moesteer.errors import MoesteerError
from moesteer.gate import Gate, RoutingProbe
from moesteer.hub.push import lay_out
from moesteer.model_facts import LayerShape, ModelFacts
from moesteer.profile import Profile
from moesteer.runs import open_run

REPO = "me/steering"


def card(profile: Profile, folder: Path, *runs: Path, **options: str) -> ModelCard:
    """The card of a profile, as huggingface_hub reads it; its images exist and are SVG."""
    profile.save(folder / "p.safetensors")
    lay_out(folder / "p.safetensors", REPO, folder / "laid", runs=runs, **options)
    loaded = ModelCard.load(folder / "laid" / "README.md")
    images = re.findall(r"!\[[^]]*\]\(([^)]+)\)", loaded.text)
    for image in images:
        assert (folder / "laid" / image).read_text().startswith("<svg xmlns=")
    there = {path.name for path in (folder / "laid").iterdir()}
    assert there == {*images, "README.md", "profile.safetensors"}
    return loaded


def section(loaded: ModelCard, title: str) -> str:
    return loaded.text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_metadata(tmp_path: Path):
    data = card(full(), tmp_path, license="mit").data.to_dict()
    assert data == {
        "base_model": "org/model",
        "base_model_relation": "adapter",
        "library_name": "moesteer",
        "license": "mit",
        "tags": ["moesteer", "steering", "moe"],
    }


def test_metadata_of_a_dense_model_in_a_folder(tmp_path: Path):
    direction = replace(directed().directions[0], sites=((0, "input"),))
    facts = ModelFacts("/x/dense", None, "llama", "c", "t", "", (), hidden=3, decoder_layers=2)
    profile = Profile(directions=(direction,), model=facts)
    loaded = card(profile, tmp_path, base_model="org/dense")
    assert loaded.data.to_dict() == {
        "base_model": "org/dense",
        "base_model_relation": "adapter",
        "library_name": "moesteer",
        "tags": ["moesteer", "steering"],
    }
    assert "# steering: steering org/dense\n" in loaded.text
    assert "/x/" not in str(loaded)


@pytest.mark.filterwarnings("ignore::moesteer.errors.MoesteerWarning")
def test_a_folder_is_no_base_model(tmp_path: Path):
    loaded = card(replace(full(), model=replace(MODEL, id="/x/mine", revision=None)), tmp_path)
    assert "base_model" not in loaded.data.to_dict()
    assert "# steering: steering mine\n" in loaded.text
    assert "moesteer generate MODEL" in loaded.text


def test_without_a_run_nothing_is_said_of_outcomes(tmp_path: Path):
    loaded = card(full(), tmp_path)
    assert "No outcome was measured" in section(loaded, "What was found")
    assert section(loaded, "Outcomes") == ""
    assert "not a defence" in loaded.text or "nor a defence" in loaded.text


def test_outcomes_as_counted_by_hand(tmp_path: Path):
    """5 of 10 unsteered, 10 of 10 steered; Wilson's intervals from the formula."""
    loaded = card(full(), tmp_path, evaluation(tmp_path / "run", full()))
    outcomes = section(loaded, "Outcomes")
    rows = [line for line in outcomes.split("\n") if line.startswith("| towns")]
    shares, less_unsteered, less_random, judge = (
        [cell.strip() for cell in row.strip("|").split("|")] for row in rows
    )
    z = 1.959963984540054
    low = (0.5 + z * z / 20 - z * (0.025 + z * z / 400) ** 0.5) / (1 + z * z / 10)
    least = 10 / (10 + z * z)
    half = f"50 % ({100 * low:.0f}–{100 * (1 - low):.0f})"
    all_ten = f"100 % ({100 * least:.0f}–100)"
    assert [cell.replace("\u202f", " ") for cell in shares] == [
        *("towns", "target: “yes”", "10", half, all_ten, r"50 % \[50–50\]"),
    ]
    assert less_unsteered[:3] == ["towns", "steered less unsteered", "+50.0"]
    assert less_unsteered[5] == "0.062"  # 2 · (1/2)⁵, by McNemar
    assert less_random[:3] == ["towns", "steered less random", "+50.0"]
    assert float(less_random[5]) == round(1 / 3**5 + 0, 3)
    assert judge[1] == "not checked: no result lies in checks"
    assert "nothing was found beyond random" in section(loaded, "What was found")
    assert "No outcome was measured" not in loaded.text


def test_a_run_of_another_profile_is_refused(tmp_path: Path):
    run = evaluation(tmp_path / "run", replace(full(), activated=((5, 1),)))
    with pytest.raises(MoesteerError, match="evaluated another profile"):
        card(full(), tmp_path, run)
    assert not (tmp_path / "laid").exists()


def test_runs_that_a_card_does_not_show(tmp_path: Path):
    with open_run(tmp_path / "run", "writers", {}, {}):
        pass
    with pytest.raises(MoesteerError, match="is a run of `writers`; a card shows"):
        card(full(), tmp_path, tmp_path / "run")


def test_scores_of_what_is_steered_come_first(tmp_path: Path):
    """33 experts, of which the two weakest are steered."""
    import numpy as np

    facts = replace(MODEL, layers=(LayerShape(0, 33, 2),), router_norms=())
    base = full().scores
    assert base is not None
    value = np.linspace(1, 0.5, 33)[None]
    scores = replace(base, **dict.fromkeys(vars(base), value))
    profile = replace(full(), activated=((0, 31),), deactivated=((0, 32),), model=facts)
    loaded = card(replace(profile, scores=scores), tmp_path)
    lines = [line for line in loaded.text.split("\n") if re.match(r"\| \d+ \| 0 \|", line)]
    experts = [int(line.split("|")[3]) for line in lines]
    assert experts == [*range(22), 31, 32]
    assert [line.split("|")[-2].strip() for line in lines[-2:]] == ["activated", "deactivated"]


def test_a_gate_is_explained(tmp_path: Path):
    gate = Gate(RoutingProbe(((1, 2),), (1.0,)), 0.5)
    loaded = card(replace(full(), gate=gate), tmp_path)
    assert "It has a gate: a request is steered" in section(loaded, "What it steers")


def test_the_commands_stand_there_without_folders(tmp_path: Path):
    command = "moesteer evaluate org/model --with /x/y/p.safetensors --out /x/y/run"
    loaded = card(full(), tmp_path, evaluation(tmp_path / "run", full(), command))
    made = section(loaded, "How it was made")
    assert "moesteer detect …\nmoesteer evaluate org/model --with p.safetensors --out run\n" in made


def test_text_from_outside_does_not_come_alive(tmp_path: Path):
    wicked = "<img src=x onerror=alert(1)> | ![x](http://x/y) # *b*"
    facts = replace(MODEL, family=wicked)
    loaded = card(replace(full(), model=facts), tmp_path)
    assert "<img" not in loaded.text
    assert "![x]" not in loaded.text
    row = next(line for line in loaded.text.split("\n") if line.startswith("| routing"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 3
