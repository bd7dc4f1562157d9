"""Every MoE architecture of the installed transformers, steered and watched from outside.

The models are random and tiny; what is asserted is the wiring. Selections are read by
`oracle.watch`, which shares no code with moesteer, and moesteer's own evidence must agree with it.
"""

import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from oracle import watch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moesteer.engines.evidence import LayerEvidence
from moesteer.engines.tiny import moe_model_types, tiny_model
from moesteer.engines.transformers.routers import MoELayer
from moesteer.engines.transformers.seam import Rows, SteeredLayer
from moesteer.engines.transformers.steering import checked_layers, steer
from moesteer.errors import DidNotFire, MoesteerError
from moesteer.profile import Expert, Profile

REFUSED = {
    "doge": "product keys",
    "jetmoe": "routes more than once in a layer",
}
TYPES = [name for name in moe_model_types() if name not in REFUSED]

SKIP = {"zaya": 8}
"""The expert of a type that stands for skipping the layer: it can be forbidden, but it never shows
at the experts' input, so it can't be proved to be selected."""


@dataclass(frozen=True)
class Built:
    model: PreTrainedModel
    layers: list[MoELayer]
    ids: Tensor
    logits: Tensor
    selected: dict[int, Tensor]
    """Unsteered selections by layer, [token, expert]."""


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


@cache
def built(model_type: str, dtype: torch.dtype = torch.float32) -> Built:
    return examined(tiny_model(model_type, dtype=dtype))


def examined(model: PreTrainedModel) -> Built:
    layers, ids = checked_layers(model), tokens(2, 10)
    logits, selected = run(model, ids)
    return Built(model, layers, ids, logits, selected)


def run(
    model: PreTrainedModel, ids: Tensor, profile: Any = None, layers: Any = None
) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits and selections by layer, steered if there is a profile; the evidence must agree."""
    steering = nullcontext() if profile is None else steer(model, profile, layers)
    with torch.no_grad(), watch(model) as seen, steering as fired:
        logits = model(ids).logits.clone()
    selected = {layer: what.selected for layer, what in sorted(seen.items())}
    if fired is not None and isinstance(profile, Profile):
        agree(fired.evidence(), selected)
    return logits, selected


def agree(evidence: Sequence[object], selected: dict[int, Tensor]) -> None:
    for entry in evidence:
        assert isinstance(entry, LayerEvidence)
        chosen = selected[entry.layer]
        assert entry.tokens == chosen.shape[0]
        for expert, times in (entry.activated | entry.deactivated).items():
            assert times == int(chosen[:, expert].sum())


def by_use(b: Built, layer: MoELayer) -> list[int]:
    """The layer's experts, those that the fewest tokens selected first."""
    used = b.selected[layer.layer].sum(0)[: layer.num_experts]
    order: list[int] = used.argsort(stable=True).tolist()
    return [expert for expert in order if expert != SKIP.get(b.model.config.model_type)]


def as_profile(activated: list[Expert], deactivated: list[Expert], **options: Any) -> Profile:
    return Profile(tuple(activated), tuple(deactivated), **options)


def contrary(b: Built, activate: int, deactivate: int, **options: Any) -> Profile:
    """In each layer: activate the experts selected least, deactivate those selected most."""
    activated, deactivated = [], []
    for layer in b.layers:
        order = by_use(b, layer)
        up = min(activate, layer.top_k)
        down = min(deactivate, layer.num_experts - max(layer.top_k, up))
        activated += [(layer.layer, expert) for expert in order[:up]]
        deactivated += [(layer.layer, expert) for expert in order[len(order) - down :]]
    return as_profile(activated, deactivated, **options)


def check_obeyed(profile: Profile, selected: dict[int, Tensor]) -> None:
    for layer, expert in profile.activated:
        assert selected[layer][:, expert].all(), (layer, expert)
    for layer, expert in profile.deactivated:
        assert not selected[layer][:, expert].any(), (layer, expert)


def wiring(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """All that each module holds, hooks included, so that two states can be compared."""

    def identity(value: Any) -> Any:
        if isinstance(value, Tensor):  # accelerate makes offloaded ones anew at each forward pass
            return value.shape, value.dtype, value.device
        if isinstance(value, dict):
            return {key: identity(held) for key, held in value.items()}
        return id(value)

    return {name: identity(vars(module)) for name, module in model.named_modules()}


# -- every architecture --------------------------------------------------------------------------


def test_support_is_complete_but_for_those_refused() -> None:
    assert len(TYPES) >= 50
    for name, reason in REFUSED.items():
        with pytest.raises(MoesteerError, match=reason):
            checked_layers(tiny_model(name))


@pytest.mark.parametrize("name", TYPES)
def test_an_empty_profile_changes_no_bit(name: str) -> None:
    b = built(name)
    for empty in (Profile(), Profile(rule="paper"), Profile(dose=0.5), [Profile(), None]):
        logits, selected = run(b.model, b.ids, empty, b.layers)
        assert torch.equal(logits, b.logits)

    # Nothing to steer attaches nothing, so put each layer under empty tables by hand.
    for empty in (Profile(), Profile(rule="paper"), Profile(dose=0.5)):
        undo = []
        for layer in b.layers:
            steered = SteeredLayer(layer, 1)
            steered.write([empty])
            undo.append(steered.attach(Rows()))
        logits, selected = run(b.model, b.ids)
        for restore in undo:
            restore()
        assert torch.equal(logits, b.logits)
        assert all(torch.equal(selected[layer], b.selected[layer]) for layer in selected)


@pytest.mark.parametrize("name", TYPES)
def test_steered_experts_obey(name: str) -> None:
    b = built(name)
    before = wiring(b.model)
    profile = contrary(b, activate=2, deactivate=2)
    for layer, expert in profile.activated:
        assert not b.selected[layer][:, expert].all()
    assert any(b.selected[layer][:, expert].any() for layer, expert in profile.deactivated)

    logits, selected = run(b.model, b.ids, profile, b.layers)

    check_obeyed(profile, selected)
    assert logits.isfinite().all()
    assert not torch.equal(logits, b.logits)
    assert wiring(b.model) == before
    assert torch.equal(run(b.model, b.ids)[0], b.logits)


@pytest.mark.parametrize("name", TYPES)
def test_k_activated_experts_are_the_selection(name: str) -> None:
    b = built(name)
    k = max(layer.top_k for layer in b.layers)
    profile = contrary(b, activate=k, deactivate=0)
    _, selected = run(b.model, b.ids, profile, b.layers)
    for layer in b.layers:
        activated, _ = profile.experts_of(layer.layer)
        chosen = torch.zeros_like(selected[layer.layer])
        chosen[:, activated] = True
        assert len(activated) == layer.top_k
        assert torch.equal(selected[layer.layer], chosen)


@pytest.mark.parametrize("name", TYPES)
def test_all_others_deactivated_leaves_k(name: str) -> None:
    b = built(name)
    profile = contrary(b, activate=0, deactivate=99)
    logits, selected = run(b.model, b.ids, profile, b.layers)
    check_obeyed(profile, selected)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", TYPES)
def test_an_exception_leaves_the_model_as_it_was(name: str) -> None:
    b = built(name)
    before = wiring(b.model)
    profile = contrary(b, activate=1, deactivate=1)
    with pytest.raises(KeyboardInterrupt), steer(b.model, [profile, None], b.layers):
        raise KeyboardInterrupt
    assert wiring(b.model) == before
    assert torch.equal(run(b.model, b.ids)[0], b.logits)


@pytest.mark.parametrize("name", TYPES)
def test_each_row_follows_its_own_profile(name: str) -> None:
    b = built(name)
    first, second = contrary(b, 1, 1, name="first"), contrary(b, 0, 2, name="second")
    profiles = [first, None, second, first]
    ids = tokens(4, 8, seed=1)
    logits, selected = run(b.model, ids, profiles, b.layers)
    for row, profile in enumerate(profiles):
        alone, selected_alone = run(b.model, ids[row : row + 1], profile, b.layers)
        torch.testing.assert_close(logits[row : row + 1], alone, atol=1e-4, rtol=1e-4)
        for layer, chosen in selected_alone.items():
            assert torch.equal(selected[layer].view(4, 8, -1)[row], chosen)


@pytest.mark.parametrize("name", TYPES)
def test_the_papers_rule_touches_only_steered_layers(name: str) -> None:
    """log_softmax in a layer without steered experts would change routers that sigmoid follows."""
    b = built(name)
    first, last = b.layers[0], b.layers[-1]
    early = as_profile([(first.layer, by_use(b, first)[0])], [], rule="paper", name="early")
    late = as_profile([(last.layer, by_use(b, last)[0])], [], rule="paper", name="late")
    logits, selected = run(b.model, b.ids, [early, late], b.layers)
    for row, profile in enumerate((early, late)):
        alone, _ = run(b.model, b.ids[row : row + 1], profile, b.layers)
        torch.testing.assert_close(logits[row : row + 1], alone, atol=1e-4, rtol=1e-4)
    for layer in b.layers[:-1]:
        length = b.ids.shape[1]
        assert torch.equal(selected[layer.layer][length:], b.selected[layer.layer][length:])


# -- both rules ----------------------------------------------------------------------------------

SHIFT_INVARIANT = [
    "aria_text",
    "cohere2_moe",
    "dbrx",
    "deepseek_v2",
    "flex_olmo",
    "gemma4_text",
    "gpt_oss",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "jamba",
    "mellum",
    "minimax",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen4_exp_text",
]
"""Types whose softmax follows the rewrite and nothing else decides."""


@pytest.mark.parametrize("name", SHIFT_INVARIANT)
def test_both_rules_agree_where_routing_is_shift_invariant(name: str) -> None:
    b = built(name)
    exact = contrary(b, activate=1, deactivate=2)
    logits, selected = run(b.model, b.ids, exact, b.layers)
    by_paper, selected_by_paper = run(b.model, b.ids, replace(exact, rule="paper"), b.layers)
    torch.testing.assert_close(by_paper, logits, atol=1e-4, rtol=1e-4)
    for layer in selected:
        assert torch.equal(selected[layer], selected_by_paper[layer])


def test_a_dose_goes_part_of_the_way() -> None:
    b = built("mixtral")
    full = contrary(b, activate=1, deactivate=1)
    times = []
    for dose in (0.0, 0.3, 0.6, 1.0):
        logits, selected = run(b.model, b.ids, replace(full, dose=dose), b.layers)
        layer, expert = full.activated[0]
        times.append(int(selected[layer][:, expert].sum()))
        assert torch.equal(logits, b.logits) == (dose == 0)
    assert times == sorted(times)
    assert times[0] < times[-1] == b.ids.numel()


# -- selection biases and groups -----------------------------------------------------------------

BIASED = [
    name
    for name in TYPES
    if any("bias" in layer.family or "groups" in layer.family for layer in built(name).layers)
]


@pytest.mark.parametrize("name", BIASED)
def test_neither_bias_nor_groups_undo_a_selection(name: str) -> None:
    """The biases are made so large that they alone decide, and all groups but one are closed."""
    model = tiny_model(name)
    for parameter, tensor in (*model.named_parameters(), *model.named_buffers()):
        if parameter.rpartition(".")[2] in (
            "e_score_correction_bias",
            "balancing_biases",
            "expert_bias",
        ):
            tensor.data.copy_(torch.linspace(9, -9, tensor.shape[-1]).expand_as(tensor))
    module: Any
    for module in model.modules():
        groups = getattr(module, "topk_group", None)
        if isinstance(groups, int) and groups > 1:
            module.topk_group = 2  # of four groups of two experts; three experts are activated
    layers = checked_layers(model)
    ids = tokens(2, 10)
    logits, selected = run(model, ids)
    b = Built(model, layers, ids, logits, selected)
    k = max(layer.top_k for layer in layers)
    profile = contrary(b, activate=k, deactivate=0)
    assert not any(selected[layer][:, expert].any() for layer, expert in profile.activated[:k])
    _, selected = run(model, ids, profile, layers)
    check_obeyed(profile, selected)
    mixed = contrary(b, activate=1, deactivate=2)
    _, selected = run(model, ids, mixed, layers)
    check_obeyed(mixed, selected)


def test_there_are_biases_and_groups_to_undo_it() -> None:
    families = {layer.family for name in BIASED for layer in built(name).layers}
    assert "sigmoid + selection bias, groups → top-k" in families
    assert len(BIASED) >= 25


def test_an_activated_expert_without_weight_is_no_selection() -> None:
    """DeepSeek-V2 zeroes the scores outside of the chosen groups: in the top-k, but for nothing."""
    groups: Any = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 1}
    model = tiny_model(CONFIG_MAPPING["deepseek_v2"](**groups))
    layers = checked_layers(model)
    assert "groups" in layers[0].family
    with pytest.raises(DidNotFire, match=r"activated expert \d was selected by \d+ of 20 tokens"):
        run(model, tokens(2, 10), as_profile([(0, 0), (0, 7)], []), layers)
    # Two experts of one group lift it to the first place, so both count.
    run(model, tokens(2, 10), as_profile([(0, 0), (0, 1)], []), layers)


# -- half precision ------------------------------------------------------------------------------

FAMILIES = {layer.family: name for name in reversed(TYPES) for layer in built(name).layers[:1]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", sorted(FAMILIES.values()))
def test_half_precision_keeps_the_promise(name: str, dtype: torch.dtype) -> None:
    b = built(name, dtype)
    k = max(layer.top_k for layer in b.layers)
    for profile in (contrary(b, k, 0), contrary(b, 0, 99), contrary(b, 1, 1)):
        logits, selected = run(b.model, b.ids, profile, b.layers)
        check_obeyed(profile, selected)
        assert logits.dtype == dtype
        assert logits.isfinite().all()


@pytest.mark.parametrize("name", ["dbrx", "phimoe"])
def test_large_half_precision_logits_still_tell_experts_apart(name: str) -> None:
    """Without a guarded top-k all depends on the margin, which 0.01 is too small for beside 30."""
    model = tiny_model(name, dtype=torch.bfloat16)
    for parameter, tensor in model.named_parameters():
        if parameter.endswith(("router.layer.weight", "router.weight")):
            tensor.data.mul_(10)
    b = examined(model)
    profile = contrary(b, activate=b.layers[0].top_k, deactivate=0)
    _, selected = run(model, b.ids, profile, b.layers)
    check_obeyed(profile, selected)


# -- the handle ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [3, 4, 5])
def test_a_wrong_number_of_rows_is_refused(rows: int) -> None:
    b = built("qwen3_moe")
    before = wiring(b.model)
    profile = contrary(b, 1, 0)
    with (
        pytest.raises(MoesteerError, match=rf"{rows} rows have a profile each, but .* has 2"),
        steer(b.model, [profile, None, None, profile, None][:rows], b.layers),
    ):
        b.model(b.ids)
    assert wiring(b.model) == before


def test_rows_given_as_embeddings_are_counted_too() -> None:
    b = built("qwen3_moe")
    embedded = b.model.get_input_embeddings()(b.ids).detach()
    with (
        pytest.raises(MoesteerError, match="3 rows have a profile each, but the batch has 2"),
        steer(b.model, [None, None, None], b.layers),
    ):
        b.model(inputs_embeds=embedded)


def test_replacing_in_place() -> None:
    b = built("deepseek_v3")
    before = wiring(b.model)
    one, other = contrary(b, 1, 1, name="one"), contrary(b, 2, 0, name="other")
    expected = {p.name: run(b.model, b.ids, p, b.layers)[0] for p in (one, other)}
    with torch.no_grad(), steer(b.model, one, b.layers) as fired:
        for profile in (one, other, one):
            fired.replace(profile)
            assert all(seen.tokens == 0 for seen in fired.evidence())
            assert torch.equal(b.model(b.ids).logits, expected[profile.name])
            assert fired.name == profile.name
        fired.replace([one, other])
        mixed = b.model(b.ids).logits
        torch.testing.assert_close(mixed[0], expected["one"][0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mixed[1], expected["other"][1], atol=1e-4, rtol=1e-4)
        fired.replace(Profile())
        assert torch.equal(b.model(b.ids).logits, b.logits)
        with pytest.raises(MoesteerError, match="does not exist"):
            fired.replace(as_profile([(b.layers[0].layer, 99)], []))
        assert torch.equal(b.model(b.ids).logits, b.logits)
    assert wiring(b.model) == before


def test_nesting_is_refused_with_the_holders_name() -> None:
    b = built("olmoe")
    with steer(b.model, contrary(b, 1, 1, name="refusal"), b.layers):
        b.model(b.ids)
        with pytest.raises(MoesteerError, match=r"already steered by refusal\. Remove that"):
            steer(b.model, Profile(), b.layers)
        with pytest.raises(MoesteerError, match="already steered by refusal"):
            checked_layers(b.model)


def test_removing_twice_is_harmless_and_replacing_after_it_refused() -> None:
    b = built("olmoe")
    before = wiring(b.model)
    fired = steer(b.model, contrary(b, 1, 1), b.layers)
    b.model(b.ids)
    fired.remove()
    assert wiring(b.model) == before
    with steer(b.model, contrary(b, 2, 0, name="next"), b.layers) as after:
        fired.remove()
        b.model(b.ids)
    assert all(seen.obeyed and seen.tokens == b.ids.numel() for seen in after.evidence())
    with pytest.raises(MoesteerError, match="was removed"):
        fired.replace(contrary(b, 1, 1))
    assert wiring(b.model) == before


def test_a_profile_that_no_token_passed_did_not_fire() -> None:
    b = built("olmoe")
    with (
        pytest.raises(DidNotFire, match=r"idle did not fire in layer 0: no token"),
        steer(b.model, contrary(b, 1, 0, name="idle"), b.layers),
    ):
        pass
    fired = steer(b.model, contrary(b, 1, 0, rule="paper", name="idle"), b.layers)
    with pytest.raises(DidNotFire, match="idle"):
        fired.remove()
    assert torch.equal(run(b.model, b.ids)[0], b.logits)


def test_profiles_of_one_name_are_judged_each_by_its_own_rule() -> None:
    """The paper's rule promises no selection, also beside a namesake under the exact rule."""
    b = built("deepseek_v3")
    layer = b.layers[0].layer
    gate = b.layers[0].module
    bias = gate.e_score_correction_bias
    assert isinstance(bias, Tensor)
    kept = bias.clone()
    bias[0] = -9
    try:
        by_paper = as_profile([(layer, 0)], [], rule="paper")
        with torch.no_grad(), steer(b.model, [by_paper, Profile(((layer, 1),))], b.layers) as fired:
            b.model(b.ids)
        assert [seen.obeyed for seen in fired.evidence()] == [False, True]
    finally:
        bias.copy_(kept)


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        (as_profile([(0, 0), (0, 1), (0, 2), (0, 3)], []), "4 experts are activated in layer 0"),
        (as_profile([], [(1, e) for e in range(6)]), "6 of 8 experts are deactivated in layer 1"),
        (as_profile([(9, 0)], []), r"names layer 9, but the model routes in layers 0–3 only"),
        (as_profile([], [(2, 8)]), r"\(2, 8\) does not exist: layer 2 has experts 0–7"),
    ],
)
def test_profiles_that_cannot_be_obeyed_are_refused(profile: Profile, message: str) -> None:
    b = built("olmoe")
    before = wiring(b.model)
    for asked in (profile, [None, profile]):
        with pytest.raises(MoesteerError, match=message):
            steer(b.model, asked, b.layers)
    assert wiring(b.model) == before


def test_the_same_expert_both_ways_is_refused() -> None:
    with pytest.raises(MoesteerError, match="both activated and deactivated"):
        as_profile([(0, 1)], [(0, 1)])


# -- accelerate ----------------------------------------------------------------------------------


class Counting(ModelHook):
    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple:
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "llama4_text", "dbrx"])
def test_hooks_of_accelerate_outlive_steering(name: str) -> None:
    b = examined(tiny_model(name))
    profile = contrary(b, 1, 1)
    expected, _ = run(b.model, b.ids, profile, b.layers)
    hooks = [Counting() for _ in b.layers]
    bare = wiring(b.model)

    for layer, hook in zip(b.layers, hooks, strict=True):
        add_hook_to_module(layer.module, hook)
    hooked = wiring(b.model)
    logits, selected = run(b.model, b.ids, profile, b.layers)
    check_obeyed(profile, selected)
    assert torch.equal(logits, expected)
    assert wiring(b.model) == hooked
    assert torch.equal(run(b.model, b.ids)[0], b.logits)
    assert [hook.calls for hook in hooks] == [2] * len(hooks)
    for layer in b.layers:
        remove_hook_from_module(layer.module)
    assert {name: set(held) - {"forward"} for name, held in wiring(b.model).items()} == {
        name: set(held) for name, held in bare.items()
    }

    # Hooks that come while the model is steered see the steered router, and stay afterwards.
    with steer(b.model, profile, b.layers), torch.no_grad():
        for layer, hook in zip(b.layers, hooks, strict=True):
            add_hook_to_module(layer.module, hook)
        assert torch.equal(b.model(b.ids).logits, expected)
    assert torch.equal(run(b.model, b.ids)[0], b.logits)
    assert [hook.calls for hook in hooks] == [4] * len(hooks)
    for layer in b.layers:
        remove_hook_from_module(layer.module)
    assert torch.equal(run(b.model, b.ids)[0], b.logits)


def offloaded(model: PreTrainedModel) -> None:
    cpu_offload(model, execution_device=torch.device("cpu"))


def dispatched(model: PreTrainedModel) -> None:
    dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)


@pytest.mark.parametrize("place", [offloaded, dispatched])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_models_placed_by_accelerate(name: str, place: Callable[[PreTrainedModel], None]) -> None:
    b = examined(tiny_model(name))
    profile = contrary(b, 1, 1)
    expected, _ = run(b.model, b.ids, profile, b.layers)
    place(b.model)
    before = wiring(b.model)
    logits, selected = run(b.model, b.ids, profile, checked_layers(b.model))
    check_obeyed(profile, selected)
    assert torch.equal(logits, expected)
    assert wiring(b.model) == before
    assert torch.equal(run(b.model, b.ids)[0], b.logits)


# -- generate ------------------------------------------------------------------------------------

LENGTHS = (3, 7, 5)


def padded_batch(lengths: Sequence[int] = LENGTHS) -> dict[str, Tensor]:
    """Prompts of different length, padded on the left."""
    longest = max(lengths)
    ids, mask = tokens(len(lengths), longest), torch.ones(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, : longest - length] = 0
        mask[row, : longest - length] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generated(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | options
    output = model.generate(**inputs, eos_token_id=None, **options)  # pyright: ignore
    assert isinstance(output, Tensor)
    return output[:, inputs["input_ids"].shape[1] :]


def per_row(b: Built) -> list[Profile | None]:
    return [contrary(b, 1, 1, name="first"), None, contrary(b, 0, 2, name="second")]


def rows_that_differ(
    b: Built, profiles: list[Profile | None], lengths: Sequence[int], **options: Any
) -> list[int]:
    """The rows of a batch that don't generate what they generate alone."""
    inputs = padded_batch(lengths)
    with steer(b.model, profiles, b.layers):
        together = generated(b.model, inputs, **options)
    differing = []
    for row, (length, profile) in enumerate(zip(lengths, profiles, strict=True)):
        alone = {key: value[row : row + 1, -length:] for key, value in inputs.items()}
        with nullcontext() if profile is None else steer(b.model, profile, b.layers):
            if not torch.equal(generated(b.model, alone, **options)[0], together[row]):
                differing.append(row)
    return differing


@pytest.mark.parametrize("name", TYPES)
def test_each_row_generates_as_it_does_alone(name: str) -> None:
    b = built(name)
    lengths = LENGTHS
    if name == "deepseek_v4":
        # It compresses blocks of positions, padding among them: not steering's doing.
        assert rows_that_differ(b, [None, None, None], LENGTHS, max_new_tokens=4)
        lengths = (5, 5, 5)
    assert not rows_that_differ(b, per_row(b), lengths, max_new_tokens=4)


def test_profiles_change_what_is_generated() -> None:
    b, inputs = built("qwen3_moe"), padded_batch()
    with steer(b.model, per_row(b), b.layers):
        steered = generated(b.model, inputs)
    changed = (steered != generated(b.model, inputs)).any(-1)
    assert changed.tolist() == [True, False, True]


@pytest.mark.parametrize(
    "options", [{"cache_implementation": "static"}, {"num_beams": 2}], ids=["static", "beams"]
)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text", "phimoe"])
def test_static_caches_and_beams(name: str, options: dict[str, Any]) -> None:
    b = built(name)
    assert not rows_that_differ(b, per_row(b), LENGTHS, **options)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_sampling_follows_each_rows_profile(name: str) -> None:
    """A row draws the same numbers whatever the others do, so only its own profile may matter."""
    b = built(name)
    inputs, profiles = padded_batch(), per_row(b)

    def sampled(asked: Any) -> Tensor:
        torch.manual_seed(3)
        with steer(b.model, asked, b.layers):
            return generated(b.model, inputs, do_sample=True, temperature=1.0, top_k=0)

    together = sampled(profiles)
    for row, profile in enumerate(profiles):
        assert torch.equal(sampled(profile or Profile())[row], together[row])


# -- torch.compile -------------------------------------------------------------------------------


def test_compiled_once_and_steered_by_others() -> None:
    script = Path(__file__).with_name("compiled.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


# -- models that can't be steered ----------------------------------------------------------------


def own_routing(block: Any, calls_router: bool) -> Callable[[Tensor], Tensor]:
    """A block that routes by a rule of its own, as a fused kernel does."""

    def forward(hidden: Tensor) -> Tensor:
        flat = hidden.view(-1, hidden.shape[-1])
        if calls_router:
            block.gate(flat)
        weights, index = (flat @ block.gate.weight.T).softmax(-1).topk(block.gate.top_k)
        return block.experts(flat, index, weights).view_as(hidden)

    return forward


@pytest.mark.parametrize(
    ("calls_router", "message"),
    [(False, "does not call its router"), (True, "bypasses the router")],
)
def test_a_block_that_bypasses_its_router_is_refused(calls_router: bool, message: str) -> None:
    model: Any = tiny_model("qwen3_moe")
    block = model.model.layers[1].mlp
    block.forward = own_routing(block, calls_router)
    before = wiring(model)
    with pytest.raises(MoesteerError, match=message) as refusal:
        checked_layers(model)
    assert "layer 1" in str(refusal.value)
    assert wiring(model) == before


def test_a_dense_model_is_refused() -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    with pytest.raises(MoesteerError, match=r"LlamaForCausalLM .* is not a Mixture-of-Experts"):
        checked_layers(LlamaForCausalLM(config).eval())


def test_a_context_manager_is_what_steer_returns() -> None:
    b = built("olmoe")
    assert isinstance(steer(b.model, Profile(), b.layers), AbstractContextManager)


# -- the page ------------------------------------------------------------------------------------


def supported(page: str) -> set[str]:
    return set(re.findall(r"^\| (\w+) \|.*\| yes", page, flags=re.MULTILINE))


def test_the_page_of_architectures_is_current() -> None:
    """Exactly what its command writes, for the transformers it was made with.

    Under another version only what it promises is asked of it: no type has lost its support.
    """
    path = Path(__file__).parents[2] / "scripts" / "architectures.py"
    script = runpy.run_path(str(path))
    kept, written = script["PAGE"].read_text(encoding="utf-8"), script["page"]()
    if f"{script['MADE_WITH']}{transformers.__version__} " in kept:
        assert kept == written
    assert supported(kept) & set(moe_model_types()) <= supported(written)
    assert supported(written) == set(TYPES)
