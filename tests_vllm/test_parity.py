"""One profile, two engines: what transformers does with it, vLLM does, in every kind of routing.

The oracle is moesteer's transformers engine, which has tests of its own against formulas.
"""

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from engine import steerable
from saying import NEW_TOKENS, Said, prompts, transformers_says, vllm_says
from torch import Tensor

from moesteer.chat import TokenisedConversation
from moesteer.engines.base import Counted
from moesteer.engines.readouts import Readout, Term
from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.engines.vllm import evidence, load_profile, remove_profile
from moesteer.engines.vllm_engine import VllmEngine
from moesteer.errors import DidNotFire
from moesteer.profile import Expert, Profile

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Pair:
    """A model in both engines."""

    name: str
    vllm: VllmEngine
    transformers: TransformersEngine

    def counts(self, counted: Counted = "top-k") -> tuple[np.ndarray, np.ndarray]:
        texts = conversations()
        return (
            self.vllm.count_selections(texts, counted),
            self.transformers.count_selections(texts, counted),
        )

    def steered(self, profile: Profile) -> tuple[list[Said], list[Said]]:
        return self.vllm_says(profile), transformers_says(self.transformers.model, profile)

    def vllm_says(self, profile: Profile) -> list[Said]:
        """And its evidence: every token passed, and obeyed where that is promised."""
        load_profile(self.vllm.llm, "mine", profile)
        try:
            ours = vllm_says(self.vllm.llm, "mine")
            for seen in evidence(self.vllm.llm, "mine"):
                assert seen.tokens == sum(len(p) + NEW_TOKENS - 1 for p in prompts())
                assert seen.obeyed or profile.rule == "paper" or profile.dose < 1, seen
        finally:
            remove_profile(self.vllm.llm, "mine")
        return ours

    def rare_and_common(self) -> tuple[list[Expert], list[Expert]]:
        """In each layer the expert that fewest prompt tokens select, and the one that most do."""
        counts = self.transformers.count_selections(conversations(all_tokens=True)).sum(0)
        tokens = sum(map(len, prompts()))
        rare, common = [], []
        for row, shape in enumerate(self.transformers.facts.layers):
            of_layer = counts[row, : shape.experts]
            assert of_layer.min() < tokens / 2 < of_layer.max() * 2
            rare.append((shape.layer, int(of_layer.argmin())))
            common.append((shape.layer, int(of_layer.argmax())))
        return rare, common


def conversations(*, all_tokens: bool = False) -> list[TokenisedConversation]:
    """The prompts, and of every seven tokens the middle five."""
    return [
        TokenisedConversation(
            tuple(ids), tuple(all_tokens or 0 < n % 7 < 6 for n in range(len(ids)))
        )
        for ids in prompts()
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("models")
    return {name: models.write(name, parent / name) for name in models.MODELS}


@pytest.fixture(scope="module")
def unpatched(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What stock vLLM says of each model."""
    out = tmp_path_factory.mktemp("unpatched") / "said"
    script = [sys.executable, HERE / "unpatched.py", out, *folders.values()]
    disabled = os.environ | {"MOESTEER_DISABLE": "1"}
    subprocess.run([str(word) for word in script], env=disabled, check=True, timeout=300)
    return torch.load(out)


@pytest.fixture(scope="module", params=models.MODELS)
def pair(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Iterator[Pair]:
    folder = folders[request.param]
    with steerable(folder) as engine:
        yield Pair(request.param, engine, load_transformers(str(folder), dtype="float32"))


def test_without_a_profile_vllm_says_bit_by_bit_what_it_says_without_moesteer(
    pair: Pair, unpatched: dict[str, Any]
) -> None:
    load_profile(pair.vllm.llm, "empty", Profile())
    for name in (None, "empty"):
        for said, (logs, reply) in zip(
            vllm_says(pair.vllm.llm, name), unpatched[pair.name], strict=True
        ):
            assert torch.equal(said.logs, logs)
            assert said.reply == reply


def test_unsteered_both_engines_say_the_same(pair: Pair) -> None:
    wanted = transformers_says(pair.transformers.model)
    for ours, theirs in zip(vllm_says(pair.vllm.llm), wanted, strict=True):
        assert ours.error(theirs) < 1e-4
        assert ours.reply == theirs.reply


def test_both_engines_count_the_same(pair: Pair) -> None:
    for counted in ("top-k", "top-1"):
        ours, theirs = pair.counts(counted)
        assert ours.dtype == theirs.dtype == np.int64
        assert theirs.any()
        np.testing.assert_array_equal(ours, theirs)
    ours, theirs = pair.counts("probability")
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("how", [{}, {"rule": "paper"}, {"dose": 0.5}], ids=str)
def test_steered_both_engines_say_the_same(pair: Pair, how: dict[str, Any]) -> None:
    rare, common = pair.rare_and_common()
    profile = Profile(activated=tuple(rare[::2]), deactivated=tuple(common), **how)
    plain = transformers_says(pair.transformers.model)
    for said, wanted, before in zip(*pair.steered(profile), plain, strict=True):
        assert wanted.error(before) > 0.01  # it does something
        assert said.error(wanted) < 1e-4
        assert said.reply == wanted.reply


def test_readouts_and_divergences_are_the_same(pair: Pair) -> None:
    rare, common = pair.rare_and_common()
    profiles = [
        None,
        Profile(activated=(rare[-1],)),
        Profile(deactivated=(common[0],), rule="paper"),
        Profile(activated=(rare[0],), deactivated=(common[-1],), dose=0.5),
    ]
    readouts = [
        Readout(tuple(ids), (Term(len(ids), 7, 1.0), Term(len(ids) // 2, 9, -0.5)))
        for ids in prompts()
    ]
    np.testing.assert_allclose(
        pair.vllm.read(readouts, profiles), pair.transformers.read(readouts, profiles), atol=1e-4
    )
    texts = [TokenisedConversation(c.ids[1:], c.target[1:]) for c in conversations()]
    for profile in profiles[1:]:
        assert profile is not None
        ours, theirs = (
            engine.divergence(texts, profile) for engine in (pair.vllm, pair.transformers)
        )
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("pair", ["deepseek_v3", "glm4_moe"], indirect=True)
def test_an_expert_is_activated_against_its_bias(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No lifted logit outweighs a selection bias of −2; the guard does."""
    profile = Profile(activated=tuple((shape.layer, 0) for shape in pair.vllm.facts.layers))
    assert not pair.counts()[1][:, :, 0].any()
    for said, wanted in zip(*pair.steered(profile), strict=True):
        assert said.error(wanted) < 1e-4
        assert said.reply == wanted.reply
    unguard(pair.vllm.llm, monkeypatch)
    with pytest.raises(DidNotFire, match="expert 0 was selected by 0 of 17"):
        pair.vllm.read([Readout(tuple(prompts()[1]), (Term(3, 7, 1.0),))], [profile])


@pytest.mark.parametrize("pair", ["deepseek_v2"], indirect=True)
def test_experts_are_activated_in_more_groups_than_are_chosen(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three experts of three groups, of which two are chosen.

    In transformers a score outside the chosen groups is 0, so that an expert there can't be
    activated; the formula stands in its place here.
    """
    experts = [0, 2, 4]
    profile = Profile(
        activated=tuple((s.layer, e) for s in pair.vllm.facts.layers for e in experts)
    )
    with pytest.raises(DidNotFire):
        transformers_says(pair.transformers.model, profile)

    def choose_them(router: Any, _args: tuple, output: tuple) -> tuple:
        logits = output[0].clone()
        logits[:, experts] = logits.max(-1, keepdim=True)[0] + 0.01
        weights = logits.softmax(-1)[:, experts] * router.routed_scaling_factor
        return logits, weights, torch.tensor(experts).expand(len(logits), -1)

    routers = [m for n, m in pair.transformers.model.named_modules() if n.endswith("mlp.gate")]
    hooks = [router.register_forward_hook(choose_them) for router in routers]
    wanted = transformers_says(pair.transformers.model)
    for hook in hooks:
        hook.remove()
    for said, other in zip(pair.vllm_says(profile), wanted, strict=True):
        assert said.error(other) < 1e-4
        assert said.reply == other.reply
    unguard(pair.vllm.llm, monkeypatch)
    with pytest.raises(DidNotFire):
        pair.vllm.read([Readout(tuple(prompts()[1]), (Term(3, 7, 1.0),))], [profile])


@pytest.mark.parametrize("pair", ["phi35"], indirect=True)
def test_what_is_known_to_differ_of_phi35(pair: Pair) -> None:
    """vLLM loads the bias of Phi-3.5's LM head and never adds it, and takes the jitter as 0.01.

    (The third difference, long or short factors of LongRoPE by `max_model_len`, shows in texts that
    are longer than these.) Where this fails, vLLM has changed, and `models.py` may too.
    """
    from vllm.model_executor.models.phimoe import sparsemixer

    def write(bias: Tensor, value: float) -> None:
        with torch.no_grad():
            bias[7] = value

    model: Any = pair.transformers.model
    worker = pair.vllm.llm.llm_engine.model_executor.driver_worker.worker
    biases = [model.lm_head.bias, worker.model_runner.get_model().lm_head.bias]
    before = transformers_says(model), vllm_says(pair.vllm.llm)
    for bias in biases:
        write(bias, 1.0)
    theirs, ours = transformers_says(model), vllm_says(pair.vllm.llm)
    for bias in biases:
        write(bias, 0.0)
    assert theirs[1].error(before[0][1]) > 0.1
    assert ours[1].error(before[1][1]) == 0
    assert inspect.signature(sparsemixer).parameters["jitter_eps"].default == 0.01
    assert model.config.router_jitter_noise == 0.01


def unguard(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let lifted logits alone decide."""
    for layer in routed_layers(llm):
        assert layer.selection is not None
        monkeypatch.setattr(layer, "selection", None)


def routed_layers(llm: Any) -> list[Any]:
    def found(worker: Any) -> list[Any]:
        modules = worker.model_runner.get_model().modules()
        layers = [module.__dict__.get("moesteer_layer") for module in modules]
        return [layer for layer in layers if layer is not None]

    return llm.collective_rpc(found)[0]
