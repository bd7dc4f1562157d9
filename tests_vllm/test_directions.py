"""Made-up directions, added and ablated in vLLM, against plain hooks on transformers' modules."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import pytest
import torch
from engine import running
from saying import prompts
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams, TokensPrompt

from moesteer import testbed
from moesteer.engines.transformers.steering import steer
from moesteer.engines.vllm import names_of
from moesteer.engines.vllm.directions import Direction, Operation, Place, Window
from moesteer.engines.vllm.payload import payload_of
from moesteer.profile import Profile

PROMPT, NEW_TOKENS, LAYER = prompts((17,))[0], 6, 2
STARTED: dict[str, Any] = {"additional_config": {"moesteer": {"directions": True}}}
CASES = list(itertools.product(get_args(Place), get_args(Operation), get_args(Window)))
EXPERTS = Profile(activated=((1, 3),), deactivated=((3, 5),))


NO_EXPERTS = Profile()


@dataclass(frozen=True)
class Does:
    """What one request does: its directions, in which window, and experts beside them."""

    directions: tuple[Direction, ...]
    window: Window = "all"
    experts: Profile = NO_EXPERTS


def vector(seed: int = 0) -> tuple[float, ...]:
    hidden = 128
    return tuple(torch.randn(hidden, generator=torch.Generator().manual_seed(seed)).tolist())


def one(place: Place, operation: Operation, window: Window = "all") -> Does:
    return Does((Direction(LAYER, place, operation, vector(), 0.5),), window)


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


def vllm_says(llm: LLM, asked: Sequence[Does | None]) -> list[Said]:
    """All in one batch, each by its own."""
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=NEW_TOKENS,
            ignore_eos=True,
            prompt_logprobs=-1,
            logprobs=-1,
            extra_args=None if does is None else {"moesteer": load(llm, does)},
        )
        for does in asked
    ]
    requests = [TokensPrompt(prompt_token_ids=PROMPT) for _ in asked]
    said = []
    for output in llm.generate(requests, params, use_tqdm=False):
        completion = output.outputs[0]
        rows: Any = [*(output.prompt_logprobs or ())[1:], *(completion.logprobs or ())]
        logs = torch.tensor([[row[token].logprob for token in range(len(row))] for row in rows])
        said.append(Said(logs, list(completion.token_ids)))
    return said


def load(llm: LLM, does: Does) -> str:
    """The name under which requests may ask for it."""
    payload = payload_of(does.experts, does.directions, does.window)
    name = payload["fingerprint"]
    assert llm.collective_rpc("moesteer_load", args=(payload,)) == [None]
    names_of(llm).known[name] = name
    return name


def check(model: Any, said: Said, does: Does) -> None:
    """Compare with transformers, which reads the whole text at once."""
    ids = torch.tensor([PROMPT + said.reply[:-1]])
    with torch.no_grad(), changed(model, does), steer(model, does.experts):
        logs = model(ids).logits[0].log_softmax(-1)
    assert (said.logs - logs).abs().max() < 1e-4
    assert logs[len(PROMPT) - 1 :].argmax(-1).tolist() == said.reply


@contextmanager
def changed(model: Any, does: Does) -> Iterator[None]:
    with ExitStack() as stack:
        for direction in does.directions:
            layer = model.model.layers[direction.layer]
            hook = hook_of(direction, does.window)
            if direction.place == "input":
                handle = layer.register_forward_pre_hook(hook)
            else:
                part = layer.self_attn if direction.place == "attention" else layer.mlp
                handle = part.register_forward_hook(hook)
            stack.callback(handle.remove)
        yield


def hook_of(direction: Direction, window: Window) -> Any:
    v = torch.tensor(direction.vector)
    held = {
        "all": slice(None),
        "prompt": slice(len(PROMPT)),
        "generation": slice(len(PROMPT), None),
    }[window]

    def change(x: Tensor) -> Tensor:
        x = x.clone()
        if direction.operation == "add":
            x[:, held] += direction.coefficient * v
        else:
            unit = v / v.norm()
            x[:, held] -= (x[:, held] @ unit).unsqueeze(-1) * unit
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
    check(model, plain, Does(()))
    for does, found in zip(asked, said, strict=True):
        check(model, found, does)
        assert (found.logs - plain.logs).abs().max() > 1e-3
        before = (found.logs - plain.logs)[: len(PROMPT)].abs().max()
        assert (before < 1e-5) == (does.window == "generation")


def test_several_directions_and_experts_together(llm: LLM, model: Any) -> None:
    together = Does(
        (
            Direction(0, "input", "ablate", vector(1)),
            Direction(0, "input", "add", vector(1), 0.7),
            Direction(0, "input", "add", vector(2), -0.2),
            Direction(1, "moe", "add", vector(3), 0.3),
            Direction(3, "attention", "ablate", vector(4)),
        ),
        "all",
        EXPERTS,
    )
    # Of one place, what is ablated is ablated from what was there before anything was added.
    check(model, vllm_says(llm, [together])[0], together)
    experts = Does((Direction(1, "moe", "add", vector(3), 0.3),), "prompt", EXPERTS)
    check(model, vllm_says(llm, [experts])[0], experts)


def test_what_is_added_and_taken_away_again_changes_nothing(llm: LLM) -> None:
    back = [
        Does(tuple(Direction(LAYER, place, "add", vector(), c) for c in (0.5, -0.5)))
        for place in get_args(Place)
    ]
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
        layer.mlp.register_forward_hook(see("moe")),
    ]
    for place in get_args(Place):
        for does, gone in ((one(place, "ablate"), True), (None, False)):
            vllm_says(llm, [does])
            along = (seen[place] @ unit).abs().max().item()
            assert (along < 1e-5) == gone, (place, along)
    for handle in handles:
        handle.remove()


def test_others_in_the_batch_are_left_alone_bit_by_bit(llm: LLM) -> None:
    """A direction at the last layer, so that experts have as many tokens as without it."""
    does = Does((Direction(3, "moe", "add", vector()),))
    alone = vllm_says(llm, [None, None, None])
    mixed = vllm_says(llm, [None, does, None])
    length = len(PROMPT)  # the reply's tokens differ, and experts' batches with them
    for number in (0, 2):
        assert torch.equal(mixed[number].logs[:length], alone[number].logs[:length])
        assert torch.allclose(mixed[number].logs, alone[number].logs, atol=1e-5)
    assert not torch.allclose(mixed[1].logs, alone[1].logs, atol=1e-2)


@pytest.mark.parametrize(
    ("window", "tokens"),
    [
        ("prompt", len(PROMPT)),
        ("generation", NEW_TOKENS - 1),
        ("all", len(PROMPT) + NEW_TOKENS - 1),
    ],
)
def test_the_tokens_that_were_changed_are_counted(llm: LLM, window: Window, tokens: int) -> None:
    does = Does(
        (Direction(0, "moe", "add", vector(7)), Direction(2, "input", "ablate", vector())), window
    )
    vllm_says(llm, [does, None, one("moe", "add"), does])
    name = load(llm, does)
    found = llm.collective_rpc("moesteer_collect", args=([name],))[0][name]
    assert sorted(found["directed"]) == [[0, "moe", 2 * tokens], [2, "input", 2 * tokens]]


# -- compiled ------------------------------------------------------------------------------------


def test_compiled_they_do_the_same(model: Any) -> None:
    asked = [one(place, operation) for place, operation, window in CASES if window == "all"]
    asked.append(Does((Direction(1, "input", "add", vector(), 0.4),), "generation", EXPERTS))
    with running(testbed.model_path(), enforce_eager=False, **STARTED) as llm:
        plain, *said = vllm_says(llm, [None, *asked])
    check(model, plain, Does(()))
    for does, found in zip(asked, said, strict=True):
        check(model, found, does)


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("direction", "said"),
    [
        (
            Direction(LAYER, "moe", "add", (1.0, 2.0)),
            "has 2 numbers; the model's hidden states have",
        ),
        (Direction(99, "moe", "add", vector()), "no moe of layer 99"),
    ],
)
def test_a_direction_that_does_not_fit_is_refused(
    llm: LLM, direction: Direction, said: str
) -> None:
    payload = payload_of(Profile(), [direction])
    assert said in llm.collective_rpc("moesteer_load", args=(payload,))[0]


def test_an_engine_that_was_not_started_for_directions_refuses_them() -> None:
    with running(testbed.model_path()) as llm:
        payload = payload_of(Profile(), [Direction(LAYER, "moe", "add", vector())])
        refused = llm.collective_rpc("moesteer_load", args=(payload,))[0]
        assert "the engine was not started for directions" in refused
