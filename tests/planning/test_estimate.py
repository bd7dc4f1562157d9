"""Time and memory of a plan: what they are sums of, not how long anything takes."""

from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from counted import built, token_layers, write_config

from moesteer.engines.tiny import tiny_model
from moesteer.engines.transformers_engine import TransformersEngine
from moesteer.errors import MoesteerError
from moesteer.planning import measured, sliced
from moesteer.planning.estimate import Plan, estimate, plan_given
from moesteer.planning.measured import Cost, Measured
from moesteer.planning.roofline import COMPUTED, READ, Hardware, Roofline, parse_hardware
from moesteer.planning.sliced import Outline, build, first_layers, outline
from moesteer.planning.work import Job, Pass
from moesteer.report.plan_page import duration, size

CPU = torch.device("cpu")
JOB = Job(pairs=3, pair_tokens=8, prompt_tokens=4, prompts=2, new_tokens=3, batch_size=2, budget=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> tuple[Outline, TransformersEngine]:
    return built(folder)


# -- the slice -----------------------------------------------------------------------------------


def test_a_slice_has_every_kind_of_layer_and_no_more_than_there_is_room_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = outline(str(folder))
    monkeypatch.setattr(sliced, "SLICE", 0)
    least = build(whole, CPU)
    assert [layer.layer for layer in least.layers] == [1]  # layer 0 is dense
    assert len(list(least.model.get_submodule("model.layers").children())) == 2
    monkeypatch.setattr(sliced, "SLICE", 2**40)
    assert [layer.layer for layer in build(whole, CPU).layers] == [1, 2, 3]
    monkeypatch.setattr(sliced, "free_memory", lambda _device: 10_000)
    with pytest.raises(MoesteerError, match=r"the first 2 layers .* --hardware"):
        build(whole, CPU)


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "qwen3_next", "jamba"])
def test_a_slice_is_the_beginning_of_its_model(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    model.config.save_pretrained(tmp_path)
    whole = outline(str(tmp_path))
    short = sliced.without_weights(first_layers(whole.config, 3))
    theirs = {n: w.shape for n, w in whole.model.named_parameters()}
    ours = {n: w.shape for n, w in short.named_parameters()}
    assert ours.items() <= theirs.items()
    assert {n for n in theirs if n not in ours} == {
        n for n in theirs if "layers." in n and int(n.split("layers.")[1].split(".")[0]) >= 3
    }
    assert whole.weights == sum(w.numel() * w.itemsize for w in model.parameters())


# -- what is measured ----------------------------------------------------------------------------


def test_seconds_are_those_of_layers_times_layers_and_of_the_rest_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that moves one second whenever it is looked at."""
    whole = outline(str(folder))
    monkeypatch.setattr(sliced, "SLICE", 0)
    engine = build(whole, CPU)
    ticks = count()
    machine = Measured(whole, engine, clock=lambda: float(next(ticks)))
    # Start, two looks a layer, end: each of both layers takes 1 of 5 seconds, and 3 are the rest.
    assert machine.cost(Pass("count", 7, 1, 8, 4)).seconds == 4 * 1 + 3
    assert machine.cost(Pass("read", 1, 1, 8, 3, 1)).seconds == 3 * 1 + 3
    assert machine.cost(Pass("diverge", 1, 1, 8, 4, 2)).seconds == pytest.approx(2 * 4 * 1 + 5)
    assert machine.cost(Pass("gradient", 1, 1, 8, 4, 1)).seconds == 5 * 4 / 2


def test_the_passes_that_are_measured_are_the_engines(
    model: tuple[Outline, TransformersEngine],
) -> None:
    whole, engine = model
    machine = Measured(whole, engine)
    for kind, new, times in (
        ("count", 0, 1),
        ("read", 1, 1),
        ("gradient", 1, 1),
        ("diverge", 3, 2),
    ):
        texts = machine._texts(2, 9, new)
        getattr(machine, f"_{kind}")(*texts)  # the first tries out where the model can be entered
        with token_layers(engine) as seen:
            getattr(machine, f"_{kind}")(*texts)
        least = 2 * 8 if kind == "diverge" else 2 * 9
        assert seen[0] == least, kind
        assert len(seen) == 4 * times - (kind == "diverge"), kind  # the dense layer 0 only once
    with token_layers(engine) as seen:
        machine._steps(2, 9, 5)
    assert sum(seen) == measured.ROUNDS * 4 * 2 * (9 + 4)


def test_larger_batches_are_drawn_out(
    model: tuple[Outline, TransformersEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, engine = model
    machine = Measured(whole, engine)
    run: list[int] = []

    def linear(_kind: str, rows: int, _tokens: int, _new: int) -> measured.Taken:
        run.append(rows)
        return measured.Taken((0.1 * rows,) * 4, 1.0, 10.0 * rows)

    monkeypatch.setattr(machine, "_measured", linear)
    for rows in (100, 3, 1):
        taken = machine._taken("count", rows, 8, 0)
        assert taken.layers == pytest.approx((0.1 * rows,) * 4)
        assert (taken.rest, taken.held) == (pytest.approx(1.0), pytest.approx(10.0 * rows))
    assert run == [1, 4]


# -- sums ----------------------------------------------------------------------------------------


class Fixed:
    """A second a pass, 100 bytes."""

    def cost(self, one: Pass) -> Cost:
        return Cost(1.0, 100.0)


def made(whole: Outline, free: float) -> Plan:
    return estimate(whole, Fixed(), JOB, where="here", free=free)


def test_a_plan_adds_up(model: tuple[Outline, TransformersEngine]) -> None:
    whole, engine = model
    plan = made(whole, 1e9)
    weights = sum(w.numel() * w.itemsize for w in engine.model.parameters())
    for step in plan.steps:
        assert step.weights == weights
        assert step.memory == weights + step.cache + step.working
        assert step.total == pytest.approx(step.passes + ("score" in step.seconds))
        assert plan.fits(step)
    by_name = {step.name: step for step in plan.steps}
    assert by_name["detection"].cache == 0
    # 2 rows × 7 tokens, keys and values of 2 heads of 32 in 4 layers, 4 bytes each
    assert by_name["evaluation"].cache == 2 * 7 * 2 * 2 * 32 * 4 * 4
    assert plan.advice == []
    small = made(whole, weights / 2)
    assert not any(map(small.fits, small.steps))
    assert any("--offload" in line for line in small.advice)
    assert any("bfloat16" in line for line in small.advice)


def test_the_cache_is_as_large_as_transformers_makes_it(
    model: tuple[Outline, TransformersEngine],
) -> None:
    whole, engine = model
    cached = engine.model(torch.ones(2, 9, dtype=torch.long), use_cache=True).past_key_values
    held = sum(t.nbytes for layer in cached.layers for t in (layer.keys, layer.values))
    assert whole.cache_bytes(2 * 9) == held


def test_texts_over_the_context_are_refused(model: tuple[Outline, TransformersEngine]) -> None:
    with pytest.raises(MoesteerError, match=r"100004 tokens .* context"):
        estimate(model[0], Fixed(), replace(JOB, new_tokens=100_000), where="", free=1)


# -- hardware that is not here -------------------------------------------------------------------


def test_a_roofline_by_hand(model: tuple[Outline, TransformersEngine]) -> None:
    whole, _ = model
    experts, k, layers = 8, 3, 3
    routed = layers * experts * 3 * 32 * 16
    attention = 4 * (4 * 32 * 64 + 2 * 32 + 2 * 32)
    dense = attention + 3 * 32 * 48 + layers * 32 * experts
    tokens, head = 5 * 100, 1000 * 32
    slow = Roofline(whole, Hardware(1e9, 1e6, 1e30)).cost(Pass("count", 1, 5, 100, 4)).seconds
    assert slow == pytest.approx(2 * tokens * (dense + routed * k / experts) / (1e6 * COMPUTED))
    starved = Roofline(whole, Hardware(1e9, 1e30, 1e6)).cost(Pass("generate", 1, 1, 1, 4, 2))
    touched = dense + routed * k / experts + head
    assert starved.seconds == pytest.approx(2 * 4 * touched / (1e6 * READ))


def test_half_the_hardware_takes_twice_as_long(model: tuple[Outline, TransformersEngine]) -> None:
    one = plan_given(model[0], JOB, parse_hardware("memory=1GB,tflops=2,bandwidth=8GB"))
    other = plan_given(model[0], JOB, parse_hardware("memory=1GiB, tflops=1, bandwidth=4GB"))
    assert (one.free, other.free) == (1e9, 2**30)
    for fast, slow in zip(one.steps, other.steps, strict=True):
        assert slow.total == pytest.approx(2 * fast.total)


@pytest.mark.parametrize(
    "text",
    ["memory=1GB", "memory=1,tflops=1,bandwidth=1GB", "memory=1GB,tflops=fast,bandwidth=1GB"],
)
def test_hardware_that_can_t_be_read(text: str) -> None:
    with pytest.raises(MoesteerError, match="--hardware"):
        parse_hardware(text)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.25, "0.25 s"), (7.25, "7.2 s"), (59.6, "60 s"), (90, "1.5 min"), (7200, "2.0 h")],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_sizes() -> None:
    assert size(3 * 2**20) == "3.0 MiB"
    assert size(80 * 2**30) == "80 GiB"
