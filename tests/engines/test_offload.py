"""A model whose weights lie elsewhere between two passes says exactly what it says in memory."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from spread_out import UP, attribution, check_alike, routing

from as_user import Run
from moesteer.chat import TokenisedConversation
from moesteer.engines.evidence import LayerEvidence
from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.errors import MoesteerError
from moesteer.profile import Profile

LITTLE = {"cpu": "2MiB"}
"""The embedding and the LM head fit in, and no decoder layer."""


@pytest.fixture(scope="module")
def whole() -> TransformersEngine:
    return load_transformers("testbed")


@pytest.fixture(scope="module")
def offloaded(tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    folder = tmp_path_factory.mktemp("offloaded")
    return load_transformers("testbed", max_memory=LITTLE, offload_folder=str(folder))


def exactly(one: np.ndarray, other: np.ndarray, what: str) -> None:
    np.testing.assert_array_equal(one, other, err_msg=what)


def test_every_decoder_layer_is_elsewhere(offloaded: TransformersEngine) -> None:
    layers = offloaded.model.get_submodule("model.layers")
    assert all(weight.is_meta for weight in layers.parameters())


def test_everything_is_exactly_the_same(
    whole: TransformersEngine, offloaded: TransformersEngine
) -> None:
    check_alike(routing(offloaded), routing(whole), exactly)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # attention is switched to eager
        check_alike(attribution(offloaded), attribution(whole), exactly)


def test_steering_is_proved_on_experts_that_were_selected(offloaded: TransformersEngine) -> None:
    ids = offloaded.tokenizer("How do I clean a copper lantern?")["input_ids"]
    counts = offloaded.count_selections([TokenisedConversation(tuple(ids), (True,) * len(ids))])[0]
    favourite = [(row, int(counts[row].argmax())) for row in range(4)]
    without = Profile(deactivated=tuple(favourite), name="without")
    generated = offloaded.generate(["How do I clean a copper lantern?"], without, max_new_tokens=2)
    seen = [e for e in generated.evidence if isinstance(e, LayerEvidence)]
    assert [counts[layer, expert] > 0 for layer, expert in favourite] == [True] * 4
    assert [list(e.deactivated.values()) for e in seen] == [[0]] * 4
    assert all(e.tokens >= len(ids) for e in seen)


def test_facts_are_read_from_the_files(
    whole: TransformersEngine, offloaded: TransformersEngine
) -> None:
    assert offloaded.facts == whole.facts
    assert len(offloaded.facts.layer_norms) == len(offloaded.facts.router_norms) == 4


def test_a_model_that_needs_a_folder_says_so() -> None:
    with pytest.raises(MoesteerError, match="--offload FOLDER"):
        load_transformers("testbed", max_memory=LITTLE)


def test_detecting_with_the_weights_on_disk(run: Run, in_tmp_path: Path) -> None:
    pairs = ("--pairs", "testbed:refusal:dev")
    there = ("--max-memory", "cpu=2MiB", "--offload", "elsewhere")
    assert run("detect", "testbed", *pairs, "--out", "memory.safetensors").code == 0
    assert run("detect", "testbed", *pairs, *there, "--out", "disk.safetensors").code == 0
    memory, disk = (Profile.load(f"{name}.safetensors") for name in ("memory", "disk"))
    assert memory.scores is not None
    assert disk.scores is not None
    np.testing.assert_array_equal(disk.scores.value, memory.scores.value)
    assert disk.model == memory.model
    UP.save("up.safetensors")
    said = run("generate", "testbed", *there, "--with", "up.safetensors", "How do I clean a lamp?")
    assert (said.code, len(said.records)) == (0, 1)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--max-memory", "20GiB"), "is not DEVICE=SIZE"),
        (("--max-memory", "cpu=much"), "is not DEVICE=SIZE"),
        (("--engine", "vllm", "--offload", "there"), "--offload is for transformers"),
        (("--engine", "vllm", "--tensor-parallel", "2"), "tensor_parallel_size=2"),
    ],
)
def test_what_can_t_be_meant(refused: Run, options: tuple[str, ...], why: str) -> None:
    assert why in refused("generate", "testbed", *options, "Hi.").err


def test_offloaded_weights_can_t_be_trained(refused: Run, in_tmp_path: Path) -> None:
    there = ("--max-memory", "cpu=2MiB", "--offload", f"{in_tmp_path}-elsewhere")
    said = refused(
        *("rationale", "finetune", "testbed", "--task", "testbed:claims:fit", "--limit-dev", "2"),
        *("--dev", "testbed:claims:dev", *there, "--out", "run"),
    )
    assert "offloaded" in said.err
