"""Directions in vLLM against plain hooks on transformers' modules, and against its engine."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import models
import numpy as np
import pytest
import torch
from engine import running, steerable
from saying import prompts
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams, TokensPrompt

from moesteer import testbed
from moesteer.chat import TokenisedConversation
from moesteer.direction import Direction, Operation, Place, Site, Window
from moesteer.engines.evidence import DirectionEvidence, check_fired
from moesteer.engines.readouts import Readout, Term
from moesteer.engines.transformers.steering import steer
from moesteer.engines.transformers_engine import load_transformers
from moesteer.engines.vllm import evidence, load_profile
from moesteer.engines.vllm.directions import VECTORS, room_for
from moesteer.engines.vllm.payload import payload_of, profile_from
from moesteer.engines.vllm_engine import VllmEngine
from moesteer.errors import DidNotFire, MoesteerError
from moesteer.profile import Profile
from moesteer.profile_combining import combine

PROMPT, NEW_TOKENS, LAYER, LAYERS, HIDDEN = prompts((17,))[0], 6, 2, 4, 128
STARTED: dict[str, Any] = {"additional_config": {"moesteer": {"directions": VECTORS}}}
CASES = list(itertools.product(get_args(Place), get_args(Operation), get_args(Window)))
EXPERTS = Profile(activated=((1, 3),), deactivated=((3, 5),))
EVERYWHERE = tuple((layer, place) for layer in range(LAYERS) for place in get_args(Place))


def vector(seed: int = 0, hidden: int = HIDDEN) -> tuple[float, ...]:
    return tuple(torch.randn(hidden, generator=torch.Generator().manual_seed(seed)).tolist())


def add(
    layer: int, place: Place, coefficient: float = 0.5, seed: int = 0, **more: Any
) -> Direction:
    return Direction(vector(seed), ((layer, place),), "add", coefficient, **more)


def ablate(*sites: tuple[int, Place], seed: int = 0, **more: Any) -> Direction:
    return Direction(vector(seed), sites, "ablate", **more)


def does(*directions: Direction, **more: Any) -> Profile:
    return Profile(directions=directions, **more)


def one(place: Place, operation: Operation, window: Window = "all") -> Profile:
    if operation == "add":
        return does(add(LAYER, place, window=window))
    return does(ablate((LAYER, place), window=window))


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with running(testbed.model_path(), max_num_seqs=32, **STARTED) as llm:
        yield llm


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(testbed.model_path(), dtype=torch.float32).eval()


# -- both sides ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """Log-probabilities [place, word] of all that follows the prompt's first token; the reply."""

    logs: Tensor
    reply: list[int]


def vllm_says(llm: LLM, asked: Sequence[Profile | None]) -> list[Said]:
    """All in one batch, each by its own; each proves that it fired."""
    names = {id(p): p.fingerprint for p in asked if p is not None}
    for profile in {id(p): p for p in asked if p is not None}.values():
        load_profile(llm, names[id(profile)], profile)
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=NEW_TOKENS,
            ignore_eos=True,
            prompt_logprobs=-1,
            logprobs=-1,
            extra_args=None if profile is None else {"moesteer": names[id(profile)]},
        )
        for profile in asked
    ]
    requests = [TokensPrompt(prompt_token_ids=PROMPT) for _ in asked]
    said = []
    for output in llm.generate(requests, params, use_tqdm=False):
        completion = output.outputs[0]
        rows: Any = [*(output.prompt_logprobs or ())[1:], *(completion.logprobs or ())]
        logs = torch.tensor([[row[token].logprob for token in range(len(row))] for row in rows])
        said.append(Said(logs, list(completion.token_ids)))
    return said


def seen_of(llm: LLM, profile: Profile) -> list[DirectionEvidence]:
    """What a profile's directions did since this was last asked; they fired."""
    found = evidence(llm, profile.fingerprint)
    check_fired(profile, found)
    return [seen for seen in found if isinstance(seen, DirectionEvidence)]


def check(model: Any, said: Said, profile: Profile) -> None:
    """Compare with transformers, which reads the whole text at once."""
    ids = torch.tensor([PROMPT + said.reply[:-1]])
    experts = replace(profile, directions=())
    with torch.no_grad(), changed(model, profile), steer(model, experts):
        logs = model(ids).logits[0].log_softmax(-1)
    assert (said.logs - logs).abs().max() < 1e-4
    assert logs[len(PROMPT) - 1 :].argmax(-1).tolist() == said.reply


@contextmanager
def changed(model: Any, profile: Profile) -> Iterator[None]:
    """Plain hooks; what is ablated is ablated from what was there before anything was added."""
    order = sorted(profile.directions, key=lambda direction: direction.operation == "add")
    with ExitStack() as stack:
        for direction in order:
            for number, place in direction.sites:
                layer = model.model.layers[number]
                weights: list[Tensor] = []
                hook = hook_of(direction, weights)
                if place == "input":
                    handle = layer.register_forward_pre_hook(hook)
                else:
                    part = layer.self_attn if place == "attention" else layer.mlp
                    handle = part.register_forward_hook(hook)
                if direction.expert is not None:
                    watch = weight_hook(layer.mlp.gate.weight, direction.expert, weights)
                    stack.callback(layer.mlp.register_forward_pre_hook(watch).remove)
                stack.callback(handle.remove)
        yield


def weight_hook(router: Tensor, expert: int, weights: list[Tensor]) -> Any:
    def hook(_module: nn.Module, args: tuple) -> None:
        weights[:] = [(args[0] @ router.T).softmax(-1)[..., expert]]

    return hook


def hook_of(direction: Direction, weights: list[Tensor]) -> Any:
    v = torch.tensor(direction.vector)
    held = {
        "all": slice(None),
        "prompt": slice(len(PROMPT)),
        "generation": slice(len(PROMPT), None),
    }[direction.window]

    def change(x: Tensor) -> Tensor:
        x = x.clone()
        if direction.operation == "ablate":
            unit = v / v.norm()
            x[:, held] -= (x[:, held] @ unit).unsqueeze(-1) * unit
        elif direction.expert is None:
            x[:, held] += direction.coefficient * v
        else:
            x[:, held] += direction.coefficient * weights[0][:, held].unsqueeze(-1) * v
        return x

    def hook(_module: nn.Module, args: tuple, *output: Any) -> Any:
        given = output[0] if output else args
        if isinstance(given, tuple):
            return (change(given[0]), *given[1:])
        return change(given)

    return hook


# -- what they do --------------------------------------------------------------------------------


def test_every_place_operation_and_window_in_one_batch(llm: LLM, model: Any) -> None:
    asked = [one(*case) for case in CASES]
    plain, *said = vllm_says(llm, [None, *asked])
    check(model, plain, Profile())
    for profile, found in zip(asked, said, strict=True):
        check(model, found, profile)
        assert (found.logs - plain.logs).abs().max() > 1e-3
        before = (found.logs - plain.logs)[: len(PROMPT)].abs().max()
        assert (before < 1e-5) == (profile.directions[0].window == "generation")


def test_a_line_is_projected_out_everywhere(llm: LLM, model: Any) -> None:
    """As Arditi et al. do it: of all that enters a layer, and of all that is written."""
    profile = does(ablate(*EVERYWHERE))
    check(model, vllm_says(llm, [profile])[0], profile)
    seen = seen_of(llm, profile)
    assert [(s.layer, s.place) for s in seen] == list(EVERYWHERE)
    assert all(s.measured < 1e-5 for s in seen)


@pytest.mark.parametrize("window", get_args(Window))
def test_directions_of_experts_are_weighted_by_the_router(
    llm: LLM, model: Any, window: Window
) -> None:
    """One expert, and several of a layer, in requests side by side; beside steered experts too."""
    single = does(add(LAYER, "mlp", 3.0, expert=4, window=window))
    several = does(
        *(add(LAYER, "mlp", 2.0 - e, seed=e, expert=e, window=window) for e in (0, 3, 5)),
        add(1, "mlp", -2.0, expert=2, window=window),
        add(LAYER, "mlp", 0.1, seed=9),
    )
    beside = replace(single, activated=((LAYER, 4),), deactivated=((LAYER, 1),))
    plain, *said = vllm_says(llm, [None, single, several, beside])
    for profile, found in zip((single, several, beside), said, strict=True):
        check(model, found, profile)
        assert (found.logs - plain.logs).abs().max() > 1e-3


def test_several_directions_and_experts_together(llm: LLM, model: Any) -> None:
    together = does(
        ablate((0, "input"), seed=1),
        add(0, "input", 0.7, seed=1),
        add(0, "input", -0.2, seed=2, window="prompt"),
        add(0, "input", 0.4, seed=3, window="generation"),
        add(1, "mlp", 0.3, seed=3),
        ablate((3, "attention"), seed=4, window="generation"),
        add(3, "attention", 0.3, seed=4, window="prompt"),
    )
    both = combine(together, EXPERTS)
    assert both.activated
    assert both.directions
    for profile in (together, both):
        check(model, vllm_says(llm, [profile])[0], profile)
        assert len(seen_of(llm, profile)) == 7


def test_what_is_added_and_taken_away_again_changes_nothing(llm: LLM) -> None:
    back = [does(add(LAYER, place, 0.5), add(LAYER, place, -0.5)) for place in get_args(Place)]
    plain, *others = vllm_says(llm, [None, *back])
    for other in others:
        assert torch.allclose(other.logs, plain.logs, atol=1e-5)


def test_what_is_ablated_is_gone(llm: LLM) -> None:
    """In the very tensors that go on from there, seen by hooks behind ours."""
    unit = torch.tensor(vector())
    unit /= unit.norm()
    seen: dict[str, Tensor] = {}

    def see_input(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = [*args, *kwargs.values()]
        streams = [x for x in given if isinstance(x, Tensor) and x.is_floating_point()]
        seen["input"] = sum(streams, torch.zeros(()))

    def see(place: str) -> Any:
        def hook(_module: nn.Module, _args: tuple, output: Any) -> None:
            seen[place] = output[0] if isinstance(output, tuple) else output

        return hook

    layer = llm.collective_rpc(lambda worker: worker.model_runner.get_model())[0].model.layers[
        LAYER
    ]
    handles = [
        layer.register_forward_pre_hook(see_input, with_kwargs=True),
        layer.self_attn.register_forward_hook(see("attention")),
        layer.mlp.register_forward_hook(see("mlp")),
    ]
    for place in get_args(Place):
        for profile, gone in ((one(place, "ablate"), True), (None, False)):
            vllm_says(llm, [profile])
            along = (seen[place] @ unit).abs().max().item()
            assert (along < 1e-5) == gone, (place, along)
    for handle in handles:
        handle.remove()


def test_others_in_the_batch_are_left_alone_bit_by_bit(llm: LLM) -> None:
    """A direction at the last layer, so that experts have as many tokens as without it."""
    profile = does(add(3, "mlp"), add(3, "mlp", expert=2))
    alone = vllm_says(llm, [None, None, None])
    mixed = vllm_says(llm, [None, profile, None])
    length = len(PROMPT)  # the reply's tokens differ, and experts' batches with them
    for number in (0, 2):
        assert torch.equal(mixed[number].logs[:length], alone[number].logs[:length])
        assert torch.allclose(mixed[number].logs, alone[number].logs, atol=1e-5)
    assert not torch.allclose(mixed[1].logs, alone[1].logs, atol=1e-2)


# -- evidence ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "tokens"),
    [
        ("prompt", len(PROMPT)),
        ("generation", NEW_TOKENS - 1),
        ("all", len(PROMPT) + NEW_TOKENS - 1),
    ],
)
def test_the_evidence_says_how_far_tokens_moved(
    llm: LLM, model: Any, window: Window, tokens: int
) -> None:
    plain, weighted = (
        add(0, "mlp", -0.4, seed=7, window=window),
        add(LAYER, "mlp", 2.0, seed=3, expert=6, window=window),
    )
    profile = does(plain, ablate((3, "input"), (1, "attention"), window=window), weighted)
    reply = vllm_says(llm, [profile, None, one("mlp", "add"), profile])[0].reply
    first, input_, attention, of_expert = seen_of(llm, profile)
    assert {s.tokens for s in (first, input_, attention, of_expert)} == {2 * tokens}
    assert first.expected == pytest.approx(0.4 * plain.norm, rel=1e-5)
    assert first.measured == pytest.approx(0.4 * plain.norm, rel=1e-4)
    assert (input_.place, attention.place) == ("input", "attention")
    assert max(input_.measured, attention.measured) < 1e-5
    weights: list[Tensor] = []
    mlp = model.model.layers[LAYER].mlp
    hook = weight_hook(mlp.gate.weight, 6, weights)
    handle = mlp.register_forward_pre_hook(hook)
    with torch.no_grad(), changed(model, profile):
        model(torch.tensor([PROMPT + reply[:-1]]))
    handle.remove()
    spans = {"prompt": slice(17), "generation": slice(17, None), "all": slice(None)}
    p = weights[0][0, spans[window]].mean().item()
    assert of_expert.expected == pytest.approx(2 * p * weighted.norm, rel=1e-3)
    assert of_expert.measured == pytest.approx(2 * p * weighted.norm, rel=1e-3)
    assert not seen_tokens(llm, profile)


def seen_tokens(llm: LLM, profile: Profile) -> int:
    found = evidence(llm, profile.fingerprint)
    return sum(seen.tokens for seen in found)


def directed(llm: LLM) -> Any:
    return llm.collective_rpc(lambda worker: worker.moesteer_rows.directed)[0]


@pytest.mark.parametrize("operation", get_args(Operation))
def test_what_did_not_move_as_it_should_is_no_proof(
    llm: LLM, operation: Operation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vectors in the tables are wrong; the profile's own say so."""
    profile = one("attention", operation)
    write = type(directed(llm)).write

    def wrong(self: Any, row: int, ready: Any) -> None:
        write(self, row, ready)
        self.vectors.mul_(0.5)

    monkeypatch.setattr(type(directed(llm)), "write", wrong)
    vllm_says(llm, [profile])
    with pytest.raises(DidNotFire, match=f"did not fire at the attention of layer {LAYER}: "):
        seen_of(llm, profile)


def test_a_window_without_tokens_is_no_proof(llm: LLM) -> None:
    profile = does(add(0, "mlp", seed=11, window="generation"))
    load_profile(llm, profile.fingerprint, profile)
    params = SamplingParams(max_tokens=1, extra_args={"moesteer": profile.fingerprint})
    llm.generate([TokensPrompt(prompt_token_ids=PROMPT)], params, use_tqdm=False)
    with pytest.raises(DidNotFire, match="needs a reply longer than one token"):
        seen_of(llm, profile)


# -- compiled ------------------------------------------------------------------------------------


def test_compiled_they_do_the_same(model: Any) -> None:
    asked = [one(place, operation) for place, operation, window in CASES if window == "all"]
    asked.append(does(ablate(*EVERYWHERE)))
    asked.append(combine(does(add(1, "input", 0.4, window="generation")), EXPERTS))
    asked.append(does(*(add(LAYER, "mlp", 2.0, seed=e, expert=e) for e in (1, 4))))
    with running(testbed.model_path(), enforce_eager=False, **STARTED) as llm:
        plain, *said = vllm_says(llm, [None, *asked])
        for profile in asked:
            assert seen_of(llm, profile)
    check(model, plain, Profile())
    for profile, found in zip(asked, said, strict=True):
        check(model, found, profile)


# -- against transformers' engine ----------------------------------------------------------------


def directions_for(engine: Any) -> list[Profile]:
    """Of every kind, on any model: the routed layer in the middle, and the last of all."""
    routed = engine.facts.layers[len(engine.facts.layers) // 2].layer
    layers, hidden = engine.facts.decoder_layers, engine.facts.hidden

    def v(seed: int) -> tuple[float, ...]:
        return vector(seed, hidden)

    everywhere = tuple((layer, place) for layer in range(layers) for place in get_args(Place))
    kinds = {
        "ablated everywhere": (Direction(v(1), everywhere, "ablate"),),
        "added": (Direction(v(2), ((layers - 1, "input"),), coefficient=0.5, window="prompt"),),
        "written": (
            Direction(v(3), ((0, "attention"),), coefficient=0.2),
            Direction(v(4), ((routed, "mlp"),), "ablate", window="generation"),
            Direction(v(5), ((0, "mlp"),), coefficient=-0.2),
        ),
        "experts": (
            Direction(v(6), ((routed, "mlp"),), coefficient=2.0, expert=1),
            Direction(v(7), ((routed, "mlp"),), coefficient=-1.0, expert=3),
        ),
    }
    found = [Profile(directions=which, name=name) for name, which in kinds.items()]
    return [*found, combine(found[-1], Profile(activated=((routed, 2),), name="activated"))]


@pytest.mark.parametrize("name", models.MODELS)
def test_both_engines_steer_every_model_alike(name: str, tmp_path: Path) -> None:
    theirs = load_transformers(str(models.write(name, tmp_path / name)), dtype="float32")
    profiles = directions_for(theirs)
    texts = [
        Readout(tuple(ids), (Term(len(ids) // 2, 7, 1.0), Term(len(ids), 9, -0.5)))
        for ids in prompts()
    ]
    asked = ["<|user|>How do I clean a copper lantern?<|assistant|>", "Count to 3."] * 3
    target = [
        TokenisedConversation(text.ids[1:], tuple(n > 5 for n in range(1, len(text.ids))))
        for text in texts[1:]
    ]
    with steerable(tmp_path / name, profiles) as ours:
        read = ours.read(texts, [None, *profiles])
        np.testing.assert_allclose(read, theirs.read(texts, [None, *profiles]), atol=1e-4)
        assert (abs(read[1:] - read[0]).max(-1) > 1e-3).all()
        for profile in profiles:
            np.testing.assert_allclose(
                ours.divergence(target, profile),
                theirs.divergence(target, profile),
                atol=1e-5,
                rtol=1e-3,
            )
        both = [e.generate(asked, [None, *profiles], max_new_tokens=8) for e in (ours, theirs)]
    assert both[0].replies == both[1].replies
    seen, wanted = (
        {
            (e.profile, e.layer, e.place, e.expert, e.operation): e
            for e in generated.evidence
            if isinstance(e, DirectionEvidence)
        }
        for generated in both
    )
    assert seen.keys() == wanted.keys()
    for key, found in seen.items():
        if found.expert is None:
            assert found.measured == pytest.approx(wanted[key].measured, rel=1e-3, abs=1e-4), key
            assert found.expected == pytest.approx(wanted[key].expected, rel=1e-3), key
        else:  # a mean over tokens, to which transformers adds those of the padding
            assert found.measured == pytest.approx(found.expected, rel=1e-3), key


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmEngine]:
    with steerable("testbed", [one("mlp", "add")]) as engine:
        yield engine


def test_profiles_of_both_kinds_in_one_batch_do_what_they_do_alone(engine: VllmEngine) -> None:
    profiles = [
        None,
        does(ablate(*EVERYWHERE), name="ablated"),
        EXPERTS,
        does(add(LAYER, "mlp", 2.0, expert=4), name="expert"),
        combine(does(add(1, "input", 0.5, window="prompt"), name="added"), EXPERTS),
    ]
    asked = ["<|user|>How do I clean a copper lantern?<|assistant|>"] * len(profiles)
    together = engine.generate(asked, profiles, max_new_tokens=12)
    alone = [engine.generate(asked[:1], p, max_new_tokens=12) for p in profiles]
    assert together.replies == [generated.replies[0] for generated in alone]
    seen = [seen for generated in alone for seen in generated.evidence]
    assert len(together.evidence) == len(seen)
    for ours, theirs in zip(together.evidence, seen, strict=True):
        if isinstance(ours, DirectionEvidence) and isinstance(theirs, DirectionEvidence):
            assert replace(ours, measured=0.0, expected=0.0) == replace(
                theirs, measured=0.0, expected=0.0
            )
            assert ours.measured == pytest.approx(theirs.measured, rel=1e-4, abs=1e-5)
        else:
            assert ours == theirs


def test_a_dense_model_takes_directions(tmp_path: Path) -> None:
    folder = models.write("llama", tmp_path / "llama")
    theirs = load_transformers(str(folder), dtype="float32", dense=True)
    sites: tuple[Site, ...] = ((1, "mlp"), (0, "attention"), (1, "input"))
    direction = Direction(vector(0, theirs.facts.hidden), sites, coefficient=0.3)
    profile = Profile(directions=(direction,))
    readout = Readout(tuple(prompts()[1]), (Term(9, 7, 1.0), Term(17, 8, 1.0)))
    with steerable(folder, [profile]) as ours:
        load_profile(ours.llm, "mine", profile)
        found = ours.read([readout], [None, profile])
        np.testing.assert_allclose(found, theirs.read([readout], [None, profile]), atol=1e-4)
        assert abs(found[1] - found[0]).max() > 1e-2


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        (does(Direction((1.0, 2.0), ((LAYER, "mlp"),))), "has 2 numbers, but the hidden states"),
        (does(add(99, "mlp")), "names layer 99, but"),
        (does(add(LAYER, "mlp", expert=99)), "names expert 99"),
        (does(Direction(vector(), ((LAYER, "mlp"),), "ablate", expert=1)), "fused kernels"),
        (does(*(add(0, "mlp", seed=n, expert=n % 8) for n in range(9))), "have 9 different"),
    ],
)
def test_a_direction_that_does_not_fit_is_refused(
    engine: VllmEngine, profile: Profile, said: str
) -> None:
    with pytest.raises(MoesteerError, match=said):
        load_profile(engine.llm, "mine", profile)
    with pytest.raises(MoesteerError, match=said):
        engine.generate(["Hi."], profile, max_new_tokens=2)


def test_what_vllm_does_not_show_is_refused(engine: VllmEngine) -> None:
    for ask in (
        lambda: engine.residuals([[5, 6]], 1),
        lambda: engine.forced_outputs([[5, 6]], LAYER, 1),
        lambda: engine.own_outputs([[5, 6]], LAYER, 1),
        lambda: engine.contributions([[5, 6]], 1, vector()),
    ):
        with pytest.raises(MoesteerError, match="use --engine transformers"):
            ask()


def test_an_engine_is_started_with_room_for_the_profiles_it_is_for() -> None:
    many = does(*(add(0, "mlp", seed=n, expert=n % 8) for n in range(9)))
    assert room_for([]) == room_for([EXPERTS]) == 0
    assert (
        room_for([EXPERTS, one("mlp", "add")]) == room_for([does(ablate(*EVERYWHERE))]) == VECTORS
    )
    assert room_for([many, EXPERTS]) == 9
    with pytest.raises(MoesteerError, match="ablates a direction from the output of expert 1"):
        room_for([does(Direction(vector(), ((0, "mlp"),), "ablate", expert=1))])


def test_an_engine_without_room_says_how_to_start_one() -> None:
    with (
        running(testbed.model_path()) as llm,
        pytest.raises(MoesteerError, match=r'without room for directions.*"directions": 8'),
    ):
        load_profile(llm, "mine", one("mlp", "add"))


def test_a_profile_goes_to_the_workers_whole() -> None:
    profile = combine(does(add(1, "mlp", 0.1, expert=2), ablate(*EVERYWHERE)), EXPERTS)
    there = profile_from(payload_of(profile))
    assert there.name == profile.fingerprint == there.fingerprint


def generated(profile: Profile, path: Path) -> subprocess.CompletedProcess[str]:
    """What the command says, with the engine in processes of its own."""
    profile.save(path)
    command = ["generate", "testbed", "Hi.", "--with", str(path), "--max-new-tokens", "4"]
    return subprocess.run(
        [sys.executable, "-m", "moesteer", *command, "--engine", "vllm"],
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_the_command_starts_an_engine_with_room(tmp_path: Path) -> None:
    profile = does(ablate(*EVERYWHERE), add(LAYER, "mlp", 2.0, expert=4))
    ended = generated(profile, tmp_path / "mine.safetensors")
    assert ended.returncode == 0, ended.stderr
    assert "fired: mine.safetensors: moved expert 4 of layer 2" in ended.stderr


def test_the_command_refuses_what_vllm_can_not_do_before_it_starts(tmp_path: Path) -> None:
    ablated = does(Direction(vector(), ((LAYER, "mlp"),), "ablate", expert=1))
    ended = generated(ablated, tmp_path / "mine.safetensors")
    assert ended.returncode == 2
    assert "Use --engine transformers" in ended.stderr
    assert "Traceback" not in ended.stderr
