"""`moesteer plan` as a user meets it."""

from pathlib import Path

import pytest

from as_user import Run
from moesteer.engines.tiny import tiny_model

SMALL = ("--pair-tokens", 12, "--prompt-tokens", 8, "--new-tokens", 4, "--batch-size", 2)
GIVEN = "memory=80GB,tflops=400,bandwidth=3TB"


def test_a_plan_of_this_machine(run: Run, model_folder: Path) -> None:
    said = run("plan", model_folder, "--pairs", 4, *SMALL)
    assert said.code == 0, said.err
    steps = ("detection", "knock-out", "search", "evaluation")
    lines = {line.split()[0]: line for line in said.out.splitlines() if line.startswith(steps)}
    assert set(lines) == set(steps)
    assert "measured here (cpu" in said.out
    assert "4 of 4 layers" in said.out
    assert all(line.split()[-1] == "yes" for line in lines.values())
    assert lines["detection"].split()[1] == "1"  # both sides of all pairs in one pass


def test_a_plan_of_another_machine(run: Run, tmp_path: Path) -> None:
    config = tmp_path / "config"  # no weights, no tokenizer
    tiny_model("qwen3_moe").config.save_pretrained(config)
    machine = "memory=1MB,tflops=1,bandwidth=1GB"
    said = run("plan", config, "--pairs", 50, *SMALL, "--hardware", machine)
    assert said.code == 0, said.err
    assert "reckoned" in said.out
    assert "divided by 3" in said.out
    assert said.out.count(" yes") + said.out.count(" no\n") + said.out.count(" no ") >= 4


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--pairs", 0), "--pairs is 0; it must be at least 1"),
        (("--pairs", 4, "--seeds", -1), "--seeds is -1; it must be at least 0"),
        (("--pairs", 4, "--layers", 9), "9 layers are to be gone into; the model has 4"),
        (("--pairs", 4, "--new-tokens", 4000), "over the context"),
        (("--pairs", 4, "--hardware", "an H100"), "memory=80GB,tflops=400"),
        (("--pairs", 4, "--device", "cuda:7"), "cuda:7"),
        (("--pairs", 4, "--device", "gpu"), "--device is 'gpu'; it names a device"),
        (("--pairs", 4, "--hardware", f"{GIVEN},memory=1GB"), "is not of the form"),
        (("--pairs", 4, "--hardware", GIVEN, "--device", "cpu"), "give one of them"),
    ],
)
def test_what_can_t_be_planned(
    refused: Run, model_folder: Path, options: tuple[object, ...], why: str
) -> None:
    assert why in refused("plan", model_folder, *options).err


def test_a_dense_model_has_no_experts_to_plan_for(refused: Run, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    folder = tmp_path.with_name(f"{tmp_path.name}-dense")
    LlamaConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2).save_pretrained(folder)
    assert "not a Mixture-of-Experts model" in refused("plan", folder, "--pairs", 4).err
