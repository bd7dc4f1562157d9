"""Rationales on vLLM: labels, occlusion, what the model names and what masking does, as on
transformers; gradients and attention are refused."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from engine import steerable

from moesteer.engines.transformers_engine import load_transformers
from moesteer.engines.vllm_engine import VllmEngine
from moesteer.errors import MoesteerError
from moesteer.rationale.explain import Settings, explain, readings_of
from moesteer.rationale.instances import read_instances
from moesteer.runs import read_run

SETTINGS = Settings(("occlusion", "unbound", "top-var-two-turn"), seeds=2, max_new_tokens=32)


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmEngine]:
    with steerable("testbed-reader") as engine:
        yield engine


@pytest.mark.parametrize("task", ["biographies", "claims"])
def test_readings_are_those_of_transformers(engine: VllmEngine, tmp_path: Path, task: str) -> None:
    instances = read_instances(f"testbed:{task}:dev")[:6]
    plain = load_transformers("testbed-reader", dtype="float32")
    for name, one in (("vllm", engine), ("transformers", plain)):
        explain(one, instances, SETTINGS, out=tmp_path / name)
    here, there = (readings_of(read_run(tmp_path / name)) for name in ("vllm", "transformers"))
    assert len(here) == len(there) == 6
    for ours, theirs in zip(here, there, strict=True):
        assert ours.predicted == theirs.predicted
        assert ours.probabilities == pytest.approx(theirs.probabilities, abs=1e-3)
        assert ours.named == theirs.named
        assert ours.scores["random 0"] == theirs.scores["random 0"]
        assert ours.scores["occlusion"] == pytest.approx(theirs.scores["occlusion"], abs=1e-2)
        for way in ("unbound", "random 0"):
            assert ours.choices[way].units == theirs.choices[way].units
            mine, other = ours.choices[way].masked, theirs.choices[way].masked
            assert mine.comprehensiveness == pytest.approx(other.comprehensiveness, abs=1e-3)
            assert mine.sufficiency == pytest.approx(other.sufficiency, abs=1e-3)


@pytest.mark.parametrize("method", ["saliency-l2", "attention-mean", "integrated-gradients"])
def test_gradients_and_attention_are_refused(
    engine: VllmEngine, tmp_path: Path, method: str
) -> None:
    instances = read_instances("testbed:biographies:dev")[:2]
    with pytest.raises(MoesteerError, match="--engine transformers"):
        explain(engine, instances, Settings((method,)), out=tmp_path / "run")
