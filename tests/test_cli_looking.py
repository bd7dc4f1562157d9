"""`doctor`, and models that can't be used."""

import json
import shutil
from pathlib import Path

import pytest

from as_user import Run

# --- doctor, and models that can't be used --------------------------------------------------------


def test_doctor(run: Run, model_folder: Path):
    for more, tested_on in (((), "a tiny random model"), (("--load",), "the loaded weights")):
        said = run("doctor", model_folder, *more)
        assert said.code == 0
        assert "qwen3_moe" in said.out
        assert "4 (0–3)" in said.out
        assert "8 a layer, k = 3" in said.out
        assert f"passed on {tested_on}" in said.out


def test_doctor_reads_the_config_alone(run: Run):
    # A Mixtral of full size, but without weights, tokenizer or network.
    config = {"model_type": "mixtral", "quantization_config": {"quant_method": "mxfp4"}}
    Path("big").mkdir()
    Path("big/config.json").write_text(json.dumps(config))
    said = run("doctor", "big")
    assert said.code == 0
    assert "32 (0–31)" in said.out
    assert "mxfp4" in said.out
    assert "--load" in said.out


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('{"model_type": "llama", "num_hidden_layers": 2}', ("llama", "Mixture-of-Experts")),
        ('{"model_type": "nonesuch"}', ("nonesuch", "does not recognize")),
        ('{"model_type": "clip"}', ("clip", "not a causal LM")),
        ("{}", ("model_type",)),
        ("{nope", ("not a valid JSON",)),
        (None, ("there is no m/config.json",)),
    ],
)
def test_doctor_of_what_is_no_moe(refused: Run, config: str | None, words: tuple[str, ...]):
    Path("m").mkdir()
    if config is not None:
        Path("m/config.json").write_text(config)
    said = refused("doctor", "m")
    for word in words:
        assert word in said.err
    assert len(said.err) < 400


@pytest.mark.parametrize("command", ["detect", "generate", "chat"])
def test_models_that_cannot_be_used(refused: Run, pairs_file: Path, command: str):
    more: tuple = ("--pairs", pairs_file, "--out", "p") if command == "detect" else ()
    more = ("hi",) if command == "generate" else more
    assert "./nope holds no model" in refused(command, "./nope", *more).err
    assert "org/nope can't be read as a model" in refused(command, "org/nope", *more).err
    Path("dense").mkdir()
    Path("dense/config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    assert "not a Mixture-of-Experts model" in refused(command, "dense", *more).err
    Path("unknown").mkdir()
    Path("unknown/config.json").write_text('{"model_type": "nonesuch"}')
    assert "nonesuch" in refused(command, "unknown", *more).err


def test_a_model_without_weights(refused: Run, model_folder: Path):
    shutil.copytree(model_folder, "m")
    Path("m/model.safetensors").unlink()
    assert "m can't be loaded" in refused("generate", "m", "hi").err
