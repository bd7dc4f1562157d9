"""Under torch.compile the seam is two operators in the graph: one graph serves every batch."""

from collections.abc import Iterator
from pathlib import Path

import models
import numpy as np
import pytest
from engine import steerable
from saying import prompts, transformers_says, vllm_says

from moesteer.chat import TokenisedConversation
from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.engines.vllm import evidence, load_profile
from moesteer.engines.vllm_engine import VllmEngine
from moesteer.profile import Profile

PROFILES = {
    "activated": Profile(activated=((1, 0), (2, 0), (2, 5))),  # against a bias of −2
    "deactivated": Profile(deactivated=((1, 3), (3, 6))),
    "paper": Profile(activated=((2, 4),), rule="paper"),
    "half": Profile(activated=((1, 2),), deactivated=((2, 1),), dose=0.5),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write("glm4_moe", tmp_path_factory.mktemp("models") / "glm4_moe")


@pytest.fixture(scope="module")
def compiled(folder: Path) -> Iterator[VllmEngine]:
    with steerable(folder, enforce_eager=False) as engine:
        yield engine


@pytest.fixture(scope="module")
def transformers(folder: Path) -> TransformersEngine:
    return load_transformers(str(folder), dtype="float32")


def test_each_profile_does_what_it_does_in_transformers(
    compiled: VllmEngine, transformers: TransformersEngine
) -> None:
    for name, profile in [(None, None), *PROFILES.items(), (None, None)]:
        if profile is not None:
            load_profile(compiled.llm, name, profile)
        wanted = transformers_says(transformers.model, profile)
        for ours, theirs in zip(vllm_says(compiled.llm, name), wanted, strict=True):
            assert ours.error(theirs) < 1e-4
            assert ours.reply == theirs.reply
    for name in ("activated", "deactivated"):
        assert all(seen.tokens and seen.obeyed for seen in evidence(compiled.llm, name))


@pytest.mark.parametrize("counted", ["top-k", "top-1", "probability"])
def test_it_counts_what_transformers_counts(
    compiled: VllmEngine, transformers: TransformersEngine, counted: str
) -> None:
    texts = [TokenisedConversation(tuple(ids), (True,) * len(ids)) for ids in prompts()]
    ours, theirs = (e.count_selections(texts, counted) for e in (compiled, transformers))  # pyright: ignore
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * (counted == "probability"))
