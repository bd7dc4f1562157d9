"""Directions in a running model, against plain hooks and against weights changed by hand."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from test_architectures import TYPES
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from moesteer.direction import Direction, Place, Site, Window
from moesteer.engines.evidence import DirectionEvidence, check_fired
from moesteer.engines.tiny import tiny_model
from moesteer.engines.transformers.routers import trace_layers
from moesteer.engines.transformers.steering import Steering, steer
from moesteer.engines.transformers.stream import Stream, find_stream
from moesteer.errors import DidNotFire, MoesteerError
from moesteer.profile import Profile

NOT_A_SUM = {
    "beam",
    "deepseek_v4",
    "hy_v4",
    "inkling2_text",
    "longcat_flash",
    "minimax",
    "qwen4_exp_text",
    "zaya",
}
"""Hyper-connections, streams that are scaled or normalised, two attentions a layer."""
PLACES: tuple[Place, ...] = ("input", "attention", "mlp")
HIDDEN = 64


def vector(seed: int = 0, size: float = 3.0) -> tuple[float, ...]:
    drawn = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(seed))
    return tuple((drawn / drawn.norm() * size).tolist())


def everywhere(stream: Stream) -> tuple[Site, ...]:
    return (*((layer, "input") for layer in range(len(stream.decoder))), *stream.writes)


def tokens(rows: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


def dense_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def prepared(name: str) -> tuple[PreTrainedModel, list, Stream]:
    model = dense_model() if name == "dense" else tiny_model(name)
    layers = [] if name == "dense" else trace_layers(model)
    return model, layers, find_stream(model, layers)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return output.logits.float()


def first(value: object) -> Tensor:
    found = value[0] if isinstance(value, tuple) else value
    assert isinstance(found, Tensor)
    return found


@contextmanager
def watched(stream: Stream, sites: tuple[Site, ...]) -> Iterator[dict[Site, list[Tensor]]]:
    """An oracle's eyes: what passes each site, read by hooks of its own, registered last."""
    seen: dict[Site, list[Tensor]] = {site: [] for site in sites}
    handles = []
    for site in sites:
        layer, place = site
        if place == "input":

            def enter(_m: object, args: tuple, kwargs: dict, site: Site = site) -> None:
                seen[site].append((args[0] if args else kwargs["hidden_states"]).clone())

            handles.append(stream.decoder[layer].register_forward_pre_hook(enter, with_kwargs=True))
        else:
            for module in stream.writes[site]:

                def leave(_m: object, _a: object, output: object, site: Site = site) -> None:
                    seen[site].append(first(output).clone())

                handles.append(module.register_forward_hook(leave))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def by_hand(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    def leave(_m: object, _a: object, output: object) -> object:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(first(output))

    handle = module.register_forward_hook(leave)
    yield
    handle.remove()


def test_nearly_all_architectures_have_a_stream() -> None:
    assert set(TYPES) > NOT_A_SUM
    assert len(TYPES) - len(NOT_A_SUM) >= 47


@pytest.mark.parametrize("name", sorted(NOT_A_SUM))
def test_a_stream_that_is_no_sum_is_refused(name: str) -> None:
    model = tiny_model(name)
    with pytest.raises(MoesteerError, match="not the sum of what its parts write"):
        find_stream(model, trace_layers(model))


@pytest.mark.parametrize("name", ["dense", "olmoe", "flex_olmo", "gemma4_text", "granitemoehybrid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_to_a_large_stream_is_found(name: str, dtype: torch.dtype) -> None:
    """A few tokens bear norms of thousands in real models, beside which a write is a rounding."""
    model, layers, stream = prepared(name)
    named = {module: path for path, module in model.named_modules()}
    wanted = {site: [named[m] for m in modules] for site, modules in stream.writes.items()}
    with torch.no_grad():
        model.get_input_embeddings().weight[:40] *= 1000  # pyright: ignore
    model = model.to(dtype)  # pyright: ignore
    found = find_stream(model, trace_layers(model) if layers else [])
    assert {site: [named[m] for m in ms] for site, ms in found.writes.items()} == wanted


@pytest.mark.parametrize("name", [*sorted(set(TYPES) - NOT_A_SUM), "dense"])
def test_writes_add_up_and_ablation_leaves_nothing(name: str) -> None:
    model, layers, stream = prepared(name)
    sites = everywhere(stream)
    ids = tokens()
    before = logits(model, ids)
    with watched(stream, sites) as seen:
        logits(model, ids)
    for layer in range(len(stream.decoder) - 1):
        entered, left = (seen[at, "input"][0] for at in (layer, layer + 1))
        written = [out for p in PLACES[1:] for out in seen.get((layer, p), [])]
        torch.testing.assert_close(
            entered + sum(out.view_as(entered) for out in written), left, atol=1e-5, rtol=1e-4
        )
    unit = torch.tensor(vector()) / 3.0
    profile = Profile(directions=(Direction(vector(), sites, "ablate"),))
    with steer(model, profile, layers, stream) as fired, watched(stream, sites) as seen:
        after = logits(model, ids)
    assert not torch.allclose(before, after)
    for passed in seen.values():
        for hidden in passed:
            share = (hidden.float() @ unit).abs() / hidden.float().norm(dim=-1).clamp(min=1e-6)
            assert share.max() < 1e-5
    evidence = fired.evidence()
    assert len(evidence) == len(sites)
    for one in evidence:
        assert isinstance(one, DirectionEvidence)
        assert one.tokens == ids.numel() * len(seen[one.layer, one.place])
        assert one.measured < 1e-5
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "flex_olmo", "granitemoehybrid", "dense"])
@pytest.mark.parametrize("place", PLACES)
def test_addition_is_what_a_plain_hook_adds(name: str, place: Place) -> None:
    model, layers, stream = prepared(name)
    ids = tokens()
    site: Site = (2, place)
    v = torch.tensor(vector())
    # What enters layer 2 is what leaves layer 1.
    module = stream.decoder[1] if place == "input" else stream.writes[site][0]
    with by_hand(module, lambda h: h + 0.7 * v):
        wanted = logits(model, ids)
    profile = Profile(directions=(Direction(vector(), (site,), coefficient=0.7),))
    with steer(model, profile, layers, stream) as fired:
        found = logits(model, ids)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    (one,) = fired.evidence()
    assert isinstance(one, DirectionEvidence)
    assert one.tokens == ids.numel()
    assert one.measured == pytest.approx(0.7 * 3.0, rel=1e-4)
    assert one.expected == pytest.approx(0.7 * 3.0, rel=1e-4)


@pytest.mark.parametrize("place", PLACES)
def test_adding_and_taking_away_restores(place: Place) -> None:
    model, layers, stream = prepared("olmoe")
    ids = tokens()
    there = Direction(vector(), ((1, place),), coefficient=2.5)
    back = there.reversed()
    with Steering(model, Profile(directions=(there, back)), layers, stream) as fired:
        torch.testing.assert_close(logits(model, ids), logits(model, ids))
        found = logits(model, ids)
        seen = fired.evidence()
    torch.testing.assert_close(found, logits(model, ids), atol=1e-5, rtol=1e-5)
    assert all(abs(one.measured) < 1e-5 for one in seen if isinstance(one, DirectionEvidence))


def test_rows_with_profiles_of_both_kinds_are_each_as_alone() -> None:
    model, layers, stream = prepared("qwen3_moe")
    ids = tokens(rows=5)
    line = Direction(vector(1), everywhere(stream), "ablate")
    profiles = [
        None,
        Profile(directions=(line,), name="ablated"),
        Profile(directions=(Direction(vector(2), ((2, "mlp"),), coefficient=-1.5),), name="added"),
        Profile(
            activated=((1, 5),),
            directions=(Direction(vector(3), ((1, "mlp"),), coefficient=4, expert=5), line),
            name="both",
        ),
        Profile(deactivated=((0, 1), (3, 2)), name="experts"),
    ]
    with steer(model, profiles, layers, stream) as fired:
        together = logits(model, ids)
    for row, profile in enumerate(profiles):
        alone = ids[row : row + 1]
        if profile is None:
            found = logits(model, alone)
        else:
            with steer(model, profile, layers, stream):
                found = logits(model, alone)
        torch.testing.assert_close(together[row], found[0], atol=1e-5, rtol=1e-4)
    assert {one.profile for one in fired.evidence()} == {"ablated", "added", "both", "experts"}


@pytest.mark.parametrize("routed", [Profile(), Profile(((1, 3),), ((1, 0),))])
def test_an_experts_addition_is_weighted_by_its_probability(routed: Profile) -> None:
    """The router's own, whatever is done to its choice: read off logits made by hand."""
    model, layers, stream = prepared("mixtral")
    assert layers[1].layer == 1
    ids, c = tokens(), 20.0
    probability: list[Tensor] = []
    router = layers[1].module
    weight = router.weight
    assert isinstance(weight, Tensor)

    def score(_m: object, args: tuple) -> None:
        own = args[0].reshape(-1, HIDDEN) @ weight.T
        probability.append(own.double().softmax(-1)[:, 3].detach())

    handle = router.register_forward_pre_hook(score)
    v = torch.tensor(vector())

    def add(hidden: Tensor) -> Tensor:
        return hidden + (c * probability[-1].view(*hidden.shape[:-1], 1) * v).float()

    with by_hand(stream.writes[1, "mlp"][0], add), steer(model, routed, layers):
        wanted = logits(model, ids)
    direction = Direction(vector(), ((1, "mlp"),), coefficient=c, expert=3)
    with steer(model, replace(routed, directions=(direction,)), layers, stream) as fired:
        found = logits(model, ids)
    handle.remove()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    one = fired.evidence()[-1]
    assert isinstance(one, DirectionEvidence)
    assert one.expected == pytest.approx(c * 3.0 * float(probability[0].mean()), rel=1e-3)
    assert one.measured == pytest.approx(one.expected, rel=1e-3)


@pytest.mark.parametrize("every", [True, False])
def test_ablating_experts_is_orthogonalising_their_down_projections(every: bool) -> None:
    model, layers, stream = prepared("qwen3_moe")
    ids, layer = tokens(rows=3, length=20), 2
    site: Site = (layer, "mlp")
    experts = layers[layer].experts
    assert experts is not None
    other = copy.deepcopy(model)
    unit = torch.tensor(vector()) / 3.0
    weights = other.get_submodule(layers[layer].name.rpartition(".")[0] + ".experts").down_proj
    assert isinstance(weights, Tensor)
    with torch.no_grad():  # [expert, hidden, intermediate]
        for expert in range(layers[layer].num_experts) if every else [4]:
            weights[expert] -= torch.outer(unit, unit @ weights[expert])
    wanted = logits(other, ids)
    assert not torch.allclose(wanted, logits(model, ids), atol=1e-4)
    direction = Direction(vector(), (site,), "ablate", expert=None if every else 4)
    with steer(model, Profile(directions=(direction,)), layers, stream) as fired:
        found = logits(model, ids)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    (one,) = fired.evidence()
    assert isinstance(one, DirectionEvidence)
    assert one.tokens == ids.numel()
    assert one.obeyed
    assert one.measured < 1e-5


def test_ablating_several_experts_at_once_is_each_of_them() -> None:
    """Of rows of their own, too; an expert that no token selects leaves nothing to take out."""
    model, layers, stream = prepared("qwen3_moe")
    ids, layer = tokens(rows=2, length=4), 2
    ablations = [
        Direction(vector(seed), ((layer, "mlp"),), "ablate", expert=seed)
        for seed in range(layers[layer].num_experts)
    ]
    whole = Profile(directions=tuple(ablations), name="all")
    with steer(model, [whole, None], layers, stream) as fired, torch.no_grad():
        with watched(stream, ((layer, "mlp"),)) as seen:
            together = logits(model, ids)
        ((written,),) = seen.values()
    torch.testing.assert_close(together[1], logits(model, ids[1:])[0], atol=1e-5, rtol=1e-4)
    assert all(one.obeyed and one.tokens == 4 for one in fired.evidence())
    with watched(stream, ((layer, "mlp"),)) as seen:
        logits(model, ids)
    ((untouched,),) = seen.values()
    expected = untouched[0].clone()
    for one in ablations:
        with steer(model, Profile(directions=(one,)), layers, stream):
            with watched(stream, ((layer, "mlp"),)) as seen:
                logits(model, ids[:1])
            ((alone,),) = seen.values()
        expected += (alone - untouched[0]).view_as(expected)
    torch.testing.assert_close(written[0], expected, atol=1e-5, rtol=1e-4)
    assert (written[0] - untouched[0]).abs().max() > 1e-3


def test_what_puts_an_experts_line_back_is_found_out() -> None:
    model, layers, stream = prepared("qwen3_moe")
    experts = layers[2].experts
    assert experts is not None
    direction = Direction(vector(), ((2, "mlp"),), "ablate", expert=4)
    kept: list[Tensor] = []
    first_of_all = experts.register_forward_hook(lambda _m, _a, out: kept.append(first(out)))
    steering = steer(model, Profile(directions=(direction,)), layers, stream)
    last = list(experts._forward_hooks)[-1]
    handle = experts.register_forward_hook(lambda _m, _a, _out: kept[-1])
    experts._forward_hooks[last] = experts._forward_hooks.pop(last)
    logits(model, tokens(rows=3, length=20))
    handle.remove()
    first_of_all.remove()
    with pytest.raises(DidNotFire, match=r"up to .* of a token's norm is left"):
        steering.remove()


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-3), (torch.bfloat16, 1e-2)])
def test_a_hundredth_of_a_line_that_is_left_is_found_out(dtype: torch.dtype, most: float) -> None:
    """In 64 dimensions; what rounding leaves is allowed, and a little more is not."""
    model, _, _ = prepared("olmoe")
    model = model.to(dtype)  # pyright: ignore
    layers = trace_layers(model)
    stream, unit = find_stream(model, layers), torch.tensor(vector()) / 3.0
    for share, proved in ((0.0, True), (most, False)):
        module = stream.writes[1, "mlp"][0]
        steering = steer(
            model, Profile(directions=(Direction(vector(), ((1, "mlp"),), "ablate"),)), layers
        )
        last = list(module._forward_hooks)[-1]

        def leak(_m: object, _a: object, out: object, share: float = share) -> object:
            h = first(out)
            return (h.float() + 1.5 * share * h.float().norm(dim=-1, keepdim=True) * unit).to(h)

        handle = module.register_forward_hook(leak)
        module._forward_hooks[last] = module._forward_hooks.pop(last)
        logits(model, tokens())
        handle.remove()
        if proved:
            steering.remove()
        else:
            with pytest.raises(DidNotFire):
                steering.remove()


@pytest.mark.parametrize("window", ["prompt", "generation", "all"])
def test_windows_in_generation_are_those_of_one_teacher_forced_pass(window: Window) -> None:
    """Greedy tokens with a cache equal those that full passes without one give, step by step."""
    model, layers, stream = prepared("qwen3_moe")
    ids, new = tokens(rows=2, length=7), 6
    direction = Direction(vector(size=6.0), ((1, "mlp"), (3, "input")), window=window)
    profile = Profile(directions=(direction,))
    with steer(model, profile, layers, stream) as fired:
        found = model.generate(ids, do_sample=False, max_new_tokens=new, pad_token_id=0)  # pyright: ignore
    count = {"prompt": 7, "generation": new - 1, "all": 7 + new - 1}[window]
    assert {one.tokens for one in fired.evidence()} == {2 * count}
    text = ids
    for _ in range(new):
        steering = Steering(model, profile, layers, stream, prompts=[7, 7])
        text = torch.cat((text, logits(model, text)[:, -1:].argmax(-1)), 1)
        if window != "generation" or text.shape[1] > 8:
            steering.remove()
        else:  # the first token is decided before any is generated
            with pytest.raises(DidNotFire):
                steering.remove()
    assert torch.equal(found, text)


HYBRID = ("granitemoehybrid", "jamba", "lfm2_moe", "nemotron_h", "qwen3_next")
"""What they keep of the past is more than keys and values."""


@pytest.mark.parametrize("name", ["dense", *sorted(set(HYBRID) & set(TYPES))])
def test_windows_know_every_cache(name: str) -> None:
    model, layers, stream = prepared(name)
    options = {"do_sample": False, "min_new_tokens": 4, "max_new_tokens": 4, "pad_token_id": 0}
    windows: dict[Window, int] = {"prompt": 9, "generation": 3}
    for window, passed in windows.items():
        profile = Profile(directions=(Direction(vector(), ((1, "input"),), window=window),))
        with steer(model, profile, layers, stream) as fired:
            model.generate(tokens(), **options)  # pyright: ignore
        assert [one.tokens for one in fired.evidence()] == [2 * passed]


@pytest.mark.parametrize("window", ["prompt", "generation", "all"])
def test_padded_prompts_are_steered_as_each_alone(window: Window) -> None:
    model, layers, stream = prepared("qwen3_moe")
    direction = Direction(vector(size=6.0), ((1, "mlp"), (2, "input")), window=window)
    profiles = [Profile(directions=(direction,)), None, Profile(directions=(direction.reversed(),))]
    rows = [tokens(1, length, seed)[0].tolist() for seed, length in enumerate((4, 9, 6))]
    ids = torch.tensor([[0] * (9 - len(row)) + row for row in rows])
    options = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    with steer(model, profiles, layers, stream):
        together = model.generate(ids, attention_mask=(ids > 0).long(), **options)  # pyright: ignore
    for row, profile, found in zip(rows, profiles, together, strict=True):
        with steer(model, profile or Profile(), layers, stream):
            alone = model.generate(torch.tensor([row]), **options)  # pyright: ignore
        assert found[9:].tolist() == alone[0, len(row) :].tolist()


def test_a_window_that_no_token_is_in_did_not_fire() -> None:
    model, layers, stream = prepared("qwen3_moe")
    direction = Direction(vector(), ((1, "mlp"),), window="generation")
    with (
        pytest.raises(DidNotFire, match="no token of its window passed"),
        steer(model, Profile(directions=(direction,)), layers, stream),
    ):
        logits(model, tokens())


def test_a_hook_that_puts_the_old_output_back_is_found_out() -> None:
    model, layers, stream = prepared("qwen3_moe")
    module = stream.writes[1, "mlp"][0]
    direction = Direction(vector(), ((1, "mlp"),))
    steering = steer(model, Profile(directions=(direction,)), layers, stream)
    hooks = module._forward_hooks
    last = list(hooks)[-1]
    handle = module.register_forward_hook(lambda _m, _a, out: first(out) - torch.tensor(vector()))
    hooks[last] = hooks.pop(last)  # what looks comes after what puts the old output back
    logits(model, tokens())
    handle.remove()
    with pytest.raises(DidNotFire, match=r"moved by .* not by 3"):
        steering.remove()


def test_half_precision_fires() -> None:
    model, layers, stream = prepared("olmoe")
    model = model.bfloat16()
    layers = trace_layers(model)
    stream = find_stream(model, layers)
    directions = (
        Direction(vector(1), everywhere(stream), "ablate"),
        Direction(vector(2), ((2, "input"),), coefficient=2),
    )
    with steer(model, Profile(directions=directions), layers, stream) as fired:
        logits(model, tokens())
    assert all(one.obeyed for one in fired.evidence())


def test_a_push_below_the_rounding_of_half_precision_is_no_failure() -> None:
    """In bf16 a stream of norm 8 keeps pushes of a hundredth only in part, and only on average."""
    model, _, _ = prepared("olmoe")
    model = model.bfloat16()
    layers = trace_layers(model)
    stream = find_stream(model, layers)
    for size, proved in ((1e-3, False), (1.0, True)):
        push = Direction(vector(2, size), ((2, "input"),))
        with steer(model, Profile(directions=(push,)), layers, stream) as fired:
            logits(model, tokens())
        (one,) = fired.evidence()
        assert isinstance(one, DirectionEvidence)
        assert one.obeyed
        assert (one.rounding < 0.1 * one.expected) == proved
        assert not replace(one, measured=-one.measured - one.rounding).obeyed or not proved


@pytest.mark.parametrize(
    ("direction", "said"),
    [
        (Direction(vector(), ((9, "mlp"),)), "no layer 9: the model has layers 0–3"),
        (Direction((1.0, 2.0), ((1, "mlp"),)), "has 2 numbers; the model's hidden states have 64"),
    ],
)
def test_a_direction_without_a_place_is_refused(direction: Direction, said: str) -> None:
    model, layers, stream = prepared("qwen3_moe")
    with pytest.raises(MoesteerError, match=said):
        steer(model, Profile(directions=(direction,)), layers, stream)
    assert torch.isfinite(logits(model, tokens())).all()


def test_a_line_leaves_the_writes_that_a_hybrid_layer_has() -> None:
    model, layers, stream = prepared("nemotron_h")
    every: tuple[Site, ...] = tuple((n, p) for n in range(len(stream.decoder)) for p in PLACES)
    lacking = [site for site in every if site[1] != "input" and site not in stream.writes]
    assert len(lacking) == len(stream.decoder)  # each has one of the two
    with steer(
        model, Profile(directions=(Direction(vector(), every, "ablate"),)), layers, stream
    ) as fired:
        logits(model, tokens())
    assert len(fired.evidence()) == len(every) - len(lacking)
    with pytest.raises(MoesteerError, match=f"layer {lacking[0][0]} of this model has no"):
        steer(model, Profile(directions=(Direction(vector(), (lacking[0],)),)), layers, stream)


def test_experts_of_a_dense_model_are_refused() -> None:
    model, layers, stream = prepared("dense")
    direction = Direction(vector(), ((1, "mlp"),), expert=2)
    with pytest.raises(MoesteerError, match="layer 1 has no experts"):
        steer(model, Profile(directions=(direction,)), layers, stream)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"vector": (0.0,) * 4}, "norm 0: it points nowhere"),
        ({"vector": (1.0, float("nan"))}, "holds nan at place 1, 1 such numbers of 2"),
        ({"sites": ()}, "needs some"),
        ({"sites": ((1, "mlp"), (1, "mlp"))}, "each once"),
        ({"sites": ((1, "router"),)}, "place is 'router'"),
        ({"coefficient": 0.0}, "not 0"),
        ({"coefficient": float("inf")}, "finite"),
        ({"coefficient": 1e308}, "together more than fp32 holds"),
        ({"vector": (1e200, 1e200)}, "together more than fp32 holds"),
        ({"operation": "ablate", "coefficient": 2.0}, "ablation has none"),
        ({"expert": 3, "sites": ((1, "input"),)}, "the mlp of its layer"),
    ],
)
def test_a_direction_that_can_not_be(wrong: dict, said: str) -> None:
    with pytest.raises(MoesteerError, match=said):
        replace(Direction((1.0, 2.0), ((1, "mlp"),)), **wrong)


def test_what_the_numbers_do_not_hold_is_said() -> None:
    profile = Profile(directions=(Direction(vector(), ((1, "input"),), coefficient=1e37),))
    seen = DirectionEvidence("far", 1, "input", None, "add", 4, math.inf, math.inf, math.inf)
    with pytest.raises(DidNotFire, match=r"further than .* hold \(to inf\). Give a smaller"):
        check_fired(profile, [seen])
