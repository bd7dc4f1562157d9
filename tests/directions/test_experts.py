"""Directions of experts: against means taken by hand, and as profiles on a running model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from made_models import Made, made_sets
from moesteer.directions.expert_means import Kind, mean_own
from moesteer.directions.experts import ablated, find_expert_directions, method_one, method_two
from moesteer.directions.prompts import AskedPrompt
from moesteer.engines.transformers.steering import steer
from moesteer.errors import MoesteerError
from moesteer.profile import Profile

LAST = 3


def made() -> Made:
    return made_sets(dense=False)


def found(kind: Kind = "forced", **more: Any) -> Profile:
    options = {"last": LAST, "kind": kind, "threshold": 5.0, "batch_size": 3, "seed": 1}
    return find_expert_directions(made().engine, made().sets, **(options | more))


def logits(profile: Profile | None = None) -> torch.Tensor:
    """After a prompt of A."""
    engine = made().engine
    ids = torch.tensor([made().sets.fit.a[0].ids])
    with torch.no_grad(), steer(engine.model, profile or Profile(), engine.layers):
        return engine.model(ids).logits[0]


@contextmanager
def kept(module: torch.nn.Module) -> Iterator[list]:
    seen: list = []
    handle = module.register_forward_hook(lambda _m, args, out: seen.append((args, out)))
    try:
        yield seen
    finally:
        handle.remove()


def forced_by_hand(prompts: Sequence[AskedPrompt], layer: int, expert: int) -> np.ndarray:
    """The mean over prompts, each in a forward pass of its own, [position, hidden]."""
    engine = made().engine
    block = engine.model.get_submodule(f"model.layers.{layer}.mlp")
    profile = Profile(((layer, expert),))
    with kept(block) as seen, torch.no_grad(), steer(engine.model, profile, engine.layers):
        for prompt in prompts:
            engine.model(torch.tensor([prompt.ids]))
    blocks = [out[0] if isinstance(out, tuple) else out for _, out in seen]
    return np.mean([out[0, -LAST:].double().numpy() for out in blocks], axis=0)


def share_by_hand(prompts: Sequence[AskedPrompt], layer: int, expert: int) -> float:
    """Of the last tokens, those that have the expert among their k, by the router's own output."""
    engine = made().engine
    router = next(one for one in engine.layers if one.layer == layer).module
    with kept(router) as seen, torch.no_grad():
        for prompt in prompts:
            engine.model(torch.tensor([prompt.ids]))
    chosen = [(out[2][-LAST:] == expert).any(-1).float().mean() for _, out in seen]
    return float(torch.stack(chosen).mean())


def test_forced_directions_are_differences_of_means() -> None:
    profile = found()
    candidates, fit = profile.candidates, made().sets.fit
    assert candidates is not None
    assert len(candidates) == 4 * 8 * LAST
    for layer, expert in ((0, 3), (2, 7), (3, 0)):
        expected = forced_by_hand(fit.a, layer, expert) - forced_by_hand(fit.b, layer, expert)
        for place, position in enumerate(range(-LAST, 0)):
            number = candidates.find(layer, position, expert)
            np.testing.assert_allclose(candidates.vector[number], expected[place], atol=2e-5)
            norm = np.linalg.norm(expected[place])
            assert candidates.scores["norm"][number] == pytest.approx(norm, abs=1e-4)


def test_own_directions_are_differences_of_pooled_means() -> None:
    profile = found("own")
    candidates, fit = profile.candidates, made().sets.fit
    assert candidates is not None
    assert set(candidates.position.tolist()) == {0}
    layer = made().engine.layers[2]
    experts: Any = layer.experts
    means = []
    for side in (fit.a, fit.b):
        outputs: dict[int, list[np.ndarray]] = {}
        for prompt in side:
            with kept(experts) as seen, torch.no_grad():
                made().engine.model(torch.tensor([prompt.ids]))
            ((hidden, index, _), _), *_ = seen
            for token in range(-LAST, 0):
                for expert in index[token].tolist():
                    one = experts.forward(
                        hidden[token, None], torch.tensor([[expert]]), torch.ones(1, 1)
                    )
                    outputs.setdefault(expert, []).append(one[0].detach().double().numpy())
        means.append({expert: np.mean(seen, axis=0) for expert, seen in outputs.items()})
    both = set(means[0]) & set(means[1])
    measured = set(candidates.expert[candidates.layer == 2].tolist())
    assert measured == both  # an expert that one side never selects has no direction
    for expert in both:
        number = candidates.find(2, 0, expert)
        expected = means[0][expert] - means[1][expert]
        np.testing.assert_allclose(candidates.vector[number], expected, atol=2e-5)


def test_the_file_keeps_all_that_was_measured(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    profile = found(progress=lambda *read: told.append(read), source="a and b")
    fit = made().sets.fit
    assert told[-1] == (4 * (len(fit.a) + len(fit.b)),) * 2
    assert not profile.steers
    profile.save(tmp_path / "e.safetensors")
    read = Profile.load(tmp_path / "e.safetensors")
    assert read.candidates is not None
    assert profile.candidates is not None
    assert read.candidates.kind == "forced"
    assert np.array_equal(read.candidates.vector, profile.candidates.vector)
    assert read.evidence == profile.evidence
    assert read.evidence is not None
    assert read.evidence.settings["threshold"] == 5.0
    assert read.evidence.counted == "top-1"
    assert profile.scores is not None
    routing = profile.candidates.scores["routing"]
    for number in range(len(profile.candidates)):
        layer, expert = profile.candidates.layer[number], profile.candidates.expert[number]
        assert routing[number] == profile.scores.value[layer, expert]
    assert np.array_equal(profile.candidates.scores["kept"] > 0, routing * 100 >= 5)
    table, any_of_k = profile.candidates, profile.candidates.scores["routing_top_k"]
    assert not np.array_equal(any_of_k, routing)
    for number in range(0, len(profile.candidates), 7):
        layer, expert = (int(of[number]) for of in (table.layer, table.expert))
        a, b = (share_by_hand(prompts, layer, expert) for prompts in (fit.a, fit.b))
        assert any_of_k[number] == pytest.approx(a - b, abs=1e-6)


def test_only_these_layers() -> None:
    some = found(layers=[3, 1, 3]).candidates
    whole = found().candidates
    assert some is not None
    assert whole is not None
    assert sorted(set(some.layer.tolist())) == [1, 3]
    assert np.array_equal(some.vector, whole.vector[np.isin(whole.layer, (1, 3))])


# -- methods -------------------------------------------------------------------------------------


def keeping(profile: Profile, layer: int, *experts: int) -> Profile:
    """The profile as if the threshold had kept these experts of the layer, and no others."""
    candidates = profile.candidates
    assert candidates is not None
    chosen = (candidates.layer == layer) & np.isin(candidates.expert, experts)
    scores = candidates.scores | {"kept": chosen.astype(float)}
    return replace(profile, candidates=replace(candidates, scores=scores))


def test_method_two_with_one_kept_expert_is_method_one() -> None:
    profile = keeping(found(), 1, 5)
    one, two = method_one(profile, 1, 5, -1, -2.0), method_two(profile, 1, -1, -2.0)
    assert one.fingerprint == two.fingerprint
    assert torch.equal(logits(one), logits(two))
    assert not torch.allclose(logits(one), logits(), atol=1e-3)
    assert one.toward == "b"


def test_method_two_adds_what_each_expert_adds() -> None:
    """The last layer's outputs move by c Σ p_e v_e, with p from the router's own logits."""
    profile = keeping(found(), 3, 2, 6)
    candidates = profile.candidates
    assert candidates is not None
    engine = made().engine
    ids = torch.tensor([made().sets.fit.a[0].ids])
    block = engine.model.get_submodule("model.layers.3.mlp")
    written = []
    for steering in (Profile(), method_two(profile, 3, -2, 4.0)):
        with (
            kept(engine.layers[3].module) as routed,
            torch.no_grad(),
            steer(engine.model, steering, engine.layers, engine.stream),
            kept(block) as seen,
        ):
            engine.model(ids)
        out = seen[0][1]
        written.append((out[0] if isinstance(out, tuple) else out)[0].double())
    p = routed[0][1][0].double().softmax(-1)
    moved = sum(
        4.0
        * p[:, expert, None]
        * torch.tensor(candidates.vector[candidates.find(3, -2, expert)]).double()
        for expert in (2, 6)
    )
    torch.testing.assert_close(written[1] - written[0], moved, atol=1e-5, rtol=1e-4)


def test_ablation_is_of_one_experts_output() -> None:
    profile = ablated(found(), 2, 4, -1)
    (direction,) = profile.directions
    assert (direction.operation, direction.expert) == ("ablate", 4)
    assert direction.sites == ((2, "mlp"),)
    assert profile.toward == "b"


def test_methods_say_what_is_missing() -> None:
    profile = keeping(found(), 1, 5)
    with pytest.raises(MoesteerError, match="no expert of layer 2 was kept at position -1"):
        method_two(profile, 2, -1, 1.0)
    assert len(method_two(profile, 2, -1, 1.0, experts=[0, 3]).directions) == 2
    with pytest.raises(MoesteerError, match="no direction of layer 1, position -9 of expert 5"):
        method_one(profile, 1, 5, -9, 1.0)
    for none in (Profile(name="empty"), replace(profile, candidates=None)):
        with pytest.raises(MoesteerError, match="no directions of experts"):
            method_one(none, 1, 5, -1, 1.0)


# -- what can go wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"threshold": 0.0}, "--threshold is 0"),
        ({"threshold": 101.0}, "--threshold is 101"),
        ({"threshold": float("nan")}, "--threshold is nan"),
        ({"layers": []}, "--layers names none"),
        ({"layers": [2, 7]}, "layer 7 of .* has no experts; those that have are 0, 1, 2, 3"),
    ],
)
def test_bad_options_are_refused(options: dict, said: str) -> None:
    with pytest.raises(MoesteerError, match=said):
        found(**options)


def test_a_dense_model_has_no_experts() -> None:
    dense = made_sets(dense=True)
    for layers in (None, [0]):
        with pytest.raises(MoesteerError, match="dense model"):
            find_expert_directions(dense.engine, dense.sets, last=LAST, layers=layers)


def test_nan_names_prompt_and_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = made().engine
    real = engine.forced_outputs

    def broken(texts: Sequence[Sequence[int]], layer: int, last: int) -> np.ndarray:
        outputs = real(texts, layer, last)
        if layer == 1:
            outputs[-1, 6, 0, 3] = np.nan
        return outputs

    monkeypatch.setattr(engine, "forced_outputs", broken)
    with pytest.raises(MoesteerError, match=r"a\.txt:\d+: expert 6 of layer 1 .*NaN"):
        found()


def test_equal_prompts_have_no_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    def alike(texts: Sequence[Sequence[int]], _layer: int, last: int) -> np.ndarray:
        return np.ones((len(texts), 8, last, 64), dtype=np.float32)

    monkeypatch.setattr(made().engine, "forced_outputs", alike)
    with pytest.raises(MoesteerError, match="all differences have norm 0"):
        found()


def test_an_own_mean_pools_tokens() -> None:
    class Counted:
        class facts:  # noqa: N801
            id = "counted"

        def own_outputs(self, texts: Sequence, layer: int, last: int) -> tuple:
            sums = np.array([[[6.0], [0.0]], [[1.0], [0.0]]], dtype=np.float32)
            return sums[: len(texts)], np.array([[3, 0], [1, 0]])[: len(texts)]

    prompts = [AskedPrompt("", (1,) * n, 1, "") for n in (9, 8)]
    mean = mean_own(Counted(), prompts, 0, 2, batch_size=2)  # pyright: ignore[reportArgumentType]
    assert mean[0].item() == 7 / 4
    assert np.isnan(mean[1]).all()


def test_a_killed_measurement_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = made().engine
    checkpoint = tmp_path / "e.partial"
    whole = found()
    real = engine.forced_outputs
    read: list[int] = []

    def killed(texts: Sequence[Sequence[int]], layer: int, last: int) -> np.ndarray:
        if layer == 2 and not checkpoint.exists():
            raise KeyboardInterrupt
        read.append(layer)
        return real(texts, layer, last)

    monkeypatch.setattr(engine, "forced_outputs", killed)
    with pytest.raises(KeyboardInterrupt):
        found(checkpoint=checkpoint)
    assert set(read) == {0, 1}
    read.clear()
    told: list[tuple[int, int]] = []
    again = found(checkpoint=checkpoint, progress=lambda *seen: told.append(seen))
    assert set(read) == {2, 3}
    assert told[-1][0] == told[-1][1]
    assert again.candidates is not None
    assert whole.candidates is not None
    assert np.array_equal(again.candidates.vector, whole.candidates.vector)
    read.clear()
    found(checkpoint=checkpoint, last=LAST - 1)  # of other positions: measured anew
    assert set(read) == {0, 1, 2, 3}
    checkpoint.write_bytes(b"not ours")
    found(checkpoint=checkpoint)
