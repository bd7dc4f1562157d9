"""Control vectors for llama.cpp: read back by its own reader, and used as it would use them."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from as_user import Run
from moesteer.direction import Direction
from moesteer.engines.readouts import Readout, Term
from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.errors import MoesteerError
from moesteer.gguf_export import export_gguf, llama_cpp_name
from moesteer.profile import Profile

WIDTH = 64


def vector(seed: int) -> tuple[float, ...]:
    return tuple(np.random.default_rng(seed).normal(size=WIDTH).tolist())


ADDED = (
    Direction(vector(0), ((2, "input"), (3, "input")), coefficient=-1.5),
    Direction(vector(1), ((3, "input"),), coefficient=0.25),
)


@pytest.fixture(scope="module")
def engine(model_folder: Path) -> TransformersEngine:
    return load_transformers(str(model_folder), dtype="float32")


@pytest.fixture(scope="module")
def profile(engine: TransformersEngine) -> Profile:
    return Profile(directions=ADDED, model=engine.facts, name="added")


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}


def test_llama_cpp_reads_what_was_written(profile: Profile, tmp_path: Path):
    file = tmp_path / "v.gguf"
    assert export_gguf(profile, file) == [1, 2]
    reader = GGUFReader(file)
    said = {
        name: reader.fields[name].contents()
        for name in (
            "general.architecture",
            "controlvector.model_hint",
            "controlvector.layer_count",
        )
    }
    assert list(said.values()) == ["controlvector", "qwen3moe", 3]
    found = tensors(file)
    assert list(found) == ["direction.1", "direction.2"]
    first, second = np.array(vector(0)), np.array(vector(1))
    for name, expected in (
        ("direction.1", -1.5 * first),
        ("direction.2", -1.5 * first + 0.25 * second),
    ):
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], expected.astype(np.float32))


def test_vectors_added_to_block_outputs_do_what_the_profile_does(
    engine: TransformersEngine, profile: Profile, tmp_path: Path
):
    ids = tuple(range(20, 32))
    vocabulary = engine.model.config.vocab_size
    readouts = [Readout(ids, (Term(len(ids), token, 1.0),)) for token in range(vocabulary)]
    unsteered, steered = engine.read(readouts, [None, profile])
    file = tmp_path / "v.gguf"
    export_gguf(profile, file)

    # As llama.cpp: direction.N on the output of block N, counted from 0.
    handles = []
    for name, added in tensors(file).items():
        block = engine.model.model.layers[int(name.removeprefix("direction."))]
        extra = torch.from_numpy(added)
        handles.append(block.register_forward_hook(lambda _m, _args, out, extra=extra: out + extra))
    with torch.no_grad():
        hooked = engine.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).numpy()
    for handle in handles:
        handle.remove()
    np.testing.assert_allclose(steered, hooked, atol=1e-4)
    assert np.abs(steered - unsteered).max() > 0.1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"directions": ()}, "no directions"),
        ({"activated": ((1, 2),)}, "steers routers"),
        ({"model": None}, "how many layers"),
    ],
)
def test_profiles_that_are_no_control_vector(profile: Profile, change: dict, words: str):
    with pytest.raises(MoesteerError, match=words):
        export_gguf(replace(profile, **change), "v.gguf")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"operation": "ablate", "coefficient": 1.0}, "ablated"),
        ({"sites": ((2, "attention"),)}, "attention of layer 2"),
        ({"sites": ((2, "input"), (3, "mlp"))}, "mlp of layer 3"),
        ({"sites": ((2, "mlp"),), "expert": 3}, "probability of expert 3"),
        ({"sites": ((0, "input"),)}, "enters layer 0"),
        ({"sites": ((1, "input"),)}, "enters layer 1"),
        ({"window": "prompt"}, "tokens of the prompt alone"),
        ({"window": "generation"}, "tokens of the generation alone"),
    ],
)
def test_directions_that_llama_cpp_would_not_use(
    profile: Profile, tmp_path: Path, change: dict, words: str
):
    other = replace(profile, directions=(ADDED[0], replace(ADDED[1], **change)))
    with pytest.raises(MoesteerError, match=f"direction 1 .*{words}"):
        export_gguf(other, tmp_path / "v.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("qwen3_moe", "qwen3moe"),
        ("gpt_oss", "gpt-oss"),
        ("olmoe", "olmoe"),
        ("mixtral", "llama"),
        ("deepseek_v3", "deepseek2"),
        ("nonesuch_moe", "nonesuch_moe"),
    ],
)
def test_names_of_llama_cpp(model_type: str, name: str):
    assert llama_cpp_name(model_type) == name


def test_export_command(run: Run, profile: Profile):
    profile.save("p.safetensors")
    said = run("export", "p.safetensors", "--out", "v.gguf")
    assert said.code == 0
    assert "direction.1, direction.2" in said.out
    assert set(tensors(Path("v.gguf"))) == {"direction.1", "direction.2"}


def test_export_refuses_in_the_users_words(refused: Run, profile: Profile):
    ablated = Direction(vector(0), ((2, "input"),), "ablate")
    replace(profile, directions=(ablated,)).save("p.safetensors")
    assert "ablated" in refused("export", "p.safetensors", "--out", "v.gguf").err
    assert "overwrite" in refused("export", "p.safetensors", "--out", "p.safetensors").err


def test_without_the_package(refused: Run, profile: Profile, monkeypatch: pytest.MonkeyPatch):
    profile.save("p.safetensors")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "moesteer[gguf]" in refused("export", "p.safetensors", "--out", "v.gguf").err
