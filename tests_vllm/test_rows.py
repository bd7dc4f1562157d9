"""The rows of a worker, over random schedules, against a plain count of who ran what."""

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moesteer.direction import Direction
from moesteer.engines.vllm.directions import Directed
from moesteer.engines.vllm.payload import payload_of
from moesteer.engines.vllm.rows import KEPT_RESULTS, Rows
from moesteer.engines.vllm.stream import Part, Stream
from moesteer.engines.vllm.tables import Tables
from moesteer.errors import MoesteerError
from moesteer.model_facts import LayerShape
from moesteer.profile import Profile

LAYERS = [LayerShape(1, 6, 2), LayerShape(4, 4, 2)]
TOKENS, ROWS, HIDDEN = 12, 3, 4
STREAM = Stream(
    (Part((1, "input"), nn.Identity()), Part((4, "mlp"), nn.Identity(), routed=True)), {}
)
PROFILES = [
    Profile(activated=((1, 5),)),
    Profile(deactivated=((1, 0), (4, 3)), rule="paper"),
    Profile(activated=((4, 1),), deactivated=((4, 2),), dose=0.5),
]


class Kept:
    """In the place of `Readings`."""

    def __init__(self) -> None:
        self.states: dict[tuple[str, int], float] = {}

    def keep(self, key: str, position: int, hidden: torch.Tensor) -> None:
        self.states[key, position] = hidden.item()


def make_rows(*, room: int = 0) -> Rows:
    tables = Tables(LAYERS, ROWS + 1, TOKENS, torch.device("cpu"), static=False)
    directed = Directed(STREAM, tables, room, HIDDEN) if room else None
    rows = Rows(tables, LAYERS, Kept(), directed)  # pyright: ignore[reportArgumentType]
    for profile in PROFILES:
        rows.load(payload_of(profile))
    return rows


@dataclass
class Running:
    """A request as the scheduler knows it, and as the oracle does."""

    id: str
    tokens: int
    profile: Profile | None
    counted: str | None
    spans: list[list[int]]
    keep: list[int]
    computed: int = 0
    seen: set[int] = field(default_factory=set)
    prompt: int = 0
    watch: str | None = None

    @property
    def ours(self) -> bool:
        return not self.only_watched or self.watch is not None

    @property
    def only_watched(self) -> bool:
        """Or not even that."""
        return self.profile is None and self.counted is None and not self.keep

    @property
    def key(self) -> str:
        alone = self.counted is not None or bool(self.keep)
        return self.id if alone or self.profile is None else self.profile.fingerprint

    def extra_args(self) -> dict[str, Any] | None:
        if not self.ours:
            return None
        count = None if self.counted is None else {"counted": self.counted, "spans": self.spans}
        fingerprint = None if self.profile is None else self.profile.fingerprint
        return {
            "moesteer": {
                "fingerprint": fingerprint,
                "key": self.key,
                "count": count,
                "keep": self.keep,
                "prompt": self.prompt or self.tokens,
                "watch": self.watch,
            }
        }

    def counts(self, position: int) -> bool:
        return self.counted is None or any(a <= position < b for a, b in self.spans)


def routing(request: str, position: int, shape: LayerShape) -> tuple[list[int], list[float]]:
    """What a token's router chooses: the same however often the token is run."""
    draw = random.Random(f"{request} {position} {shape.layer}")
    weights = [draw.choice([0.0, 0.25]), 0.75]
    draw.shuffle(weights)
    chosen = draw.sample(range(shape.experts), shape.top_k)
    if draw.random() < 0.2:  # some models append their shared experts
        chosen[draw.randrange(shape.top_k)] = max(other.experts for other in LAYERS)
    return chosen, weights


def probabilities(request: str, position: int, shape: LayerShape) -> list[float]:
    draw = random.Random(f"{request} {position} {shape.layer} softmax")
    return [draw.random() for _ in range(shape.experts)]


class Simulation:
    """A scheduler that does what vLLM's does, and a count that needs no rows."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.rows = make_rows()
        self.running: list[Running] = []
        self.ended: list[str] = []
        self.preempted: list[str] = []
        self.wanted: dict[str, Counter] = {}
        self.states: dict[tuple[str, int], float] = {}
        self.prompts: dict[str, dict[str, Running]] = {}
        self.started = 0

    def arrive(self) -> None:
        draw, tokens = self.draw, self.draw.randint(1, 9)
        profile = draw.choice([None, *PROFILES])
        counted = draw.choice([None, None, "top-k", "top-1", "probability"])
        ends = sorted(draw.sample(range(tokens + 1), min(tokens, 2)))
        spans = [ends] if len(ends) == 2 else [[0, tokens]]
        keep = [p for p in range(1, tokens + 1) if draw.random() < 0.2] if counted is None else []
        self.started += 1
        arrived = Running(f"r{self.started}", tokens, profile, counted, spans, keep)
        if counted is None and draw.random() < 0.5:  # two requests may be parts of one
            arrived.keep, arrived.prompt = [], draw.randint(1, tokens)
            arrived.watch = f"watch {self.started // 2}"
        self.running.append(arrived)

    def step(self) -> None:
        draw = self.draw
        for request in list(self.running):
            fate = draw.random()
            if request.computed == request.tokens or fate < 0.05:  # finished, or aborted
                self.running.remove(request)
                self.ended.append(request.id)
            elif request.computed and fate < 0.15:
                request.computed = 0
                self.preempted.append(request.id)
        self.rows.forget(self.ended)
        self.rows.preempt(self.preempted)
        self.ended, self.preempted = [], []
        batch: list[tuple[Running, int]] = []
        room, free = TOKENS, ROWS
        for request in draw.sample(self.running, len(self.running)):
            number = min(draw.randint(1, 5), request.tokens - request.computed, room)
            if request.watch and request.prompt - 1 not in request.seen:
                # The first token that is generated waits for the prompt.
                number = min(number, request.prompt - request.computed)
            if number and (not request.ours or free):
                batch.append((request, number))
                room, free = room - number, free - request.ours
        if batch:
            self.run(batch)

    def run(self, batch: list[tuple[Running, int]]) -> None:
        args = {request.id: request.extra_args() for request, _ in batch}
        self.rows.begin(
            [request.id for request, _ in batch],
            np.array([number for _, number in batch]),
            np.array([request.computed for request, _ in batch]),
            args.get,
        )
        tokens = [(r, r.computed + n) for r, number in batch for n in range(number)]
        self.check_masks(tokens)
        self.choose(tokens)
        self.rows.after(torch.tensor([[self.state(r, at)] for r, at in tokens]))
        for request, position in tokens:
            self.count(request, position)
        for request, number in batch:
            request.computed += number

    @staticmethod
    def state(request: Running, position: int) -> float:
        return float(int(request.id[1:]) * 100 + position)

    def check_masks(self, tokens: list[tuple[Running, int]]) -> None:
        """Each token is steered by its own request's profile, and by nothing else."""
        tables = self.rows.tables
        for place, (request, _) in enumerate(tokens):
            row, profile = int(tables.steering_rows[place]), request.profile or Profile()
            for number, shape in enumerate(LAYERS):
                activated, deactivated = profile.experts_of(shape.layer)
                assert tables.activated[number, row].nonzero().flatten().tolist() == activated
                assert tables.deactivated[number, row].nonzero().flatten().tolist() == deactivated
                assert not activated or number in tables.lifted_layers
                assert not deactivated or number in tables.lowered_layers
            if profile.steered_layers:
                assert bool(tables.paper[row]) == (profile.rule == "paper")
                assert float(tables.dose[row]) == profile.dose
                assert bool(tables.promised[row]) == (profile is PROFILES[0])
                assert tables.any_paper or profile.rule == "exact"
                assert tables.any_partial or profile.dose == 1

    def choose(self, tokens: list[tuple[Running, int]]) -> None:
        tables = self.rows.tables
        for number, shape in enumerate(LAYERS):
            for place, (request, position) in enumerate(tokens):
                chosen, weights = routing(request.id, position, shape)
                tables.chosen[number, place] = torch.tensor(chosen)
                tables.weights[number, place] = torch.tensor(weights)
                if tables.any_probability:
                    row = tables.counting_rows[place]
                    found = torch.tensor(probabilities(request.id, position, shape))
                    tables.probability[row, number, : shape.experts] += found

    def count(self, request: Running, position: int) -> None:
        if request.ours and position + 1 in request.keep:
            self.states[request.key, position + 1] = self.state(request, position)
        if not request.ours or position in request.seen:
            return
        request.seen.add(position)
        if request.watch and position == request.prompt - 1:
            self.prompts.setdefault(request.watch, {})[request.id] = request
        if request.only_watched or not request.counts(position):
            return
        total = self.wanted.setdefault(request.key, Counter())
        total["tokens"] += 1
        for shape in LAYERS:
            chosen, weights = routing(request.id, position, shape)
            if request.counted == "probability":
                for expert, p in enumerate(probabilities(request.id, position, shape)):
                    total[shape.layer, expert] += p  # pyright: ignore[reportArgumentType]
                continue
            for expert, weight in zip(chosen, weights, strict=True):
                routed = weight and expert < shape.experts
                if routed and (request.counted != "top-1" or weight == max(weights)):
                    total[shape.layer, expert] += 1

    def collect(self, keys: list[str]) -> None:
        found = self.rows.collect(keys)
        for key in keys:
            wanted = self.wanted.pop(key, Counter())
            got = found.get(key, {"tokens": 0, "selected": {}})
            assert got["tokens"] == wanted["tokens"]
            for shape in LAYERS:
                counts = got["selected"].get(shape.layer, [0] * shape.experts)
                assert counts == pytest.approx(
                    [wanted[shape.layer, expert] for expert in range(shape.experts)], abs=1e-5
                )

    def collect_prompts(self, keys: list[str]) -> None:
        """Of each prompt that has ended all of it, however it was cut or interrupted."""
        found = self.rows.collect(keys)
        for key in keys:
            wanted = self.prompts.pop(key, {})
            got = found.get(key, {"prompts": {}})["prompts"]
            assert got.keys() == wanted.keys()
            for request, told in got.items():
                length = wanted[request].prompt
                assert (told["length"], told["tokens"]) == (length, length)
                for shape in LAYERS:
                    counts = [0] * shape.experts
                    for position in range(length):
                        for expert, weight in zip(*routing(request, position, shape), strict=True):
                            if weight and expert < shape.experts:
                                counts[expert] += 1
                    assert told["selected"][shape.layer] == counts


@given(st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_each_token_is_steered_by_its_request_and_counted_once(seed: int) -> None:
    simulation = Simulation(random.Random(seed))
    for _ in range(25):
        if simulation.draw.random() < 0.5:
            simulation.arrive()
        simulation.step()
        if simulation.draw.random() < 0.2:
            simulation.collect(list(simulation.wanted)[:2])
            simulation.collect_prompts([f"watch {n}" for n in range(simulation.started)][-4:])
    simulation.rows.forget([*simulation.ended, *(request.id for request in simulation.running)])
    simulation.collect(list(simulation.wanted))
    simulation.collect_prompts(list(simulation.prompts))
    assert not simulation.rows.prompts
    assert simulation.rows.readings.states == simulation.states  # pyright: ignore
    assert not any(int(result.tokens) for result in simulation.rows.results.values())
    assert sorted(simulation.rows.free) == list(range(1, ROWS + 1))


def begin(rows: Rows, *batch: Running, tokens: int = 1) -> None:
    args = {request.id: request.extra_args() for request in batch}
    rows.begin(
        list(args),
        np.full(len(batch), tokens),
        np.array([request.computed for request in batch]),
        args.get,
    )


def request(id: str, profile: Profile | None = PROFILES[0]) -> Running:
    return Running(id, 4, profile, None, [], [])


def test_more_requests_than_rows_take_turns() -> None:
    rows = make_rows()
    six = [request(f"r{n}", PROFILES[n % 3]) for n in range(6)]
    for _ in range(3):
        begin(rows, *six[:3])
        rows.after(None)
        begin(rows, *six[3:])
        rows.after(None)
        for one in six:
            one.computed += 1
    found = rows.collect([profile.fingerprint for profile in PROFILES])
    assert {result["tokens"] for result in found.values()} == {6}
    with pytest.raises(MoesteerError, match="more than 3 steered requests"):
        begin(rows, *six[:4])


def test_a_batch_without_ours_leaves_no_row_behind() -> None:
    rows = make_rows()
    begin(rows, request("ours"), tokens=4)
    assert rows.tables.steering_rows.any()
    begin(rows, request("other", None), tokens=2)
    assert not rows.tables.steering_rows.any()
    assert not rows.tables.counting_rows.any()
    assert not rows.tables.lifted_layers | rows.tables.lowered_layers
    assert not rows.tables.any_counted


def test_a_shorter_batch_leaves_no_row_behind_it() -> None:
    rows = make_rows()
    begin(rows, request("long"), tokens=4)
    begin(rows, request("short"), tokens=1)
    assert rows.tables.steering_rows.nonzero().flatten().tolist() == [0]


def test_steps_without_requests_count_nothing() -> None:
    """A rank that waits for others runs made-up tokens, with the tables of the step before."""
    rows = make_rows(room=2)
    rows.load(payload_of(DIRECTED))
    begin(rows, Running("r", 4, None, "probability", [[0, 4]], []), request("d", DIRECTED))
    assert rows.directed is not None
    assert rows.directed.rows.any()
    rows.after(None)
    assert not rows.tables.any_probability
    assert not rows.directed.rows.any()


DIRECTED = Profile(directions=(Direction((1.0,) * HIDDEN, ((4, "mlp"),), coefficient=2.0),))


@pytest.mark.parametrize(
    ("window", "held"), [("prompt", [0, 1, 2]), ("generation", [3, 4]), ("all", [0, 1, 2, 3, 4])]
)
def test_directions_hold_in_their_window(window: Any, held: list[int]) -> None:
    rows = make_rows(room=2)
    directed = rows.directed
    assert directed is not None
    profile = Profile(directions=(replace(DIRECTED.directions[0], window=window),))
    rows.load(payload_of(profile))
    ours = {
        "fingerprint": profile.fingerprint, "key": "k", "count": None, "keep": [], "prompt": 3
    }  # fmt: skip
    other = request("other", PROFILES[1]).extra_args()
    args = {"other": other, "ours": {"moesteer": ours}}
    rows.begin(["other", "ours"], np.array([2, 5]), np.array([0, 0]), args.get)
    hidden = torch.zeros(7, HIDDEN)
    assert directed.change(0, hidden, None) is hidden
    changed = directed.change(1, hidden, None)
    assert (changed == 2).all(-1).nonzero().flatten().tolist() == [2 + at for at in held]
    assert (changed == 0).all(-1).sum() == 7 - len(held)
    rows.after(None)
    length = 2 * HIDDEN**0.5
    moved = pytest.approx(length * len(held))
    rounding = pytest.approx(
        torch.finfo(torch.float32).eps * len(held), rel=1e-4
    )  # every 2 by half
    told = [0, 4, "mlp", len(held), moved, moved, rounding, 0.0, pytest.approx(1e-4, rel=0.01)]
    assert rows.collect(["k"])["k"]["directed"] == [told]
    rows.forget(["ours"])
    begin(rows, request("next"))  # takes the same row
    assert directed.change(1, hidden, None) is hidden
    assert not directed.rows.any()


def test_a_token_that_runs_twice_is_measured_once() -> None:
    rows = make_rows(room=2)
    assert rows.directed is not None
    rows.load(payload_of(DIRECTED))
    one = request("r", DIRECTED)
    for tokens in (4, 4, 2):  # preempted after each
        begin(rows, one, tokens=tokens)
        assert (rows.directed.change(1, torch.zeros(tokens, HIDDEN), None) == 2).all()
        rows.after(None)
        rows.preempt(["r"])
    assert rows.collect([DIRECTED.fingerprint])[DIRECTED.fingerprint]["directed"][0][3] == 4


def test_results_that_nobody_asks_for_are_dropped() -> None:
    rows = make_rows()
    for number in range(KEPT_RESULTS + 2):
        one = Running(f"r{number}", 1, None, "top-k", [[0, 1]], [])
        begin(rows, one)
        rows.after(None)
        rows.forget([one.id])
    assert len(rows.results) == KEPT_RESULTS
    assert next(iter(rows.results)) == "r2"


def test_what_was_collected_leaves_nothing_behind() -> None:
    """Or ended requests would crowd out the evidence of profiles."""
    rows = make_rows()
    for number in range(20):
        one = Running(f"r{number}", 1, None, "top-k", [[0, 1]], [])
        begin(rows, one)
        rows.after(None)
        assert one.key in rows.collect([one.key])
        rows.forget([one.id])
    assert not rows.results


def test_a_profile_that_never_came_steers_and_proves_nothing() -> None:
    """An engine that was started later; the request must not end it."""
    rows = make_rows()
    stranger = Profile(activated=((1, 3),))
    begin(rows, request("ours"), request("theirs", stranger), tokens=2)
    rows.after(None)
    assert rows.tables.steering_rows[:4].tolist()[2:] == [0, 0]
    assert set(rows.collect([PROFILES[0].fingerprint, stranger.fingerprint])) == {
        PROFILES[0].fingerprint
    }


@pytest.mark.parametrize(
    ("stream", "direction", "said"),
    [
        (
            STREAM,
            Direction((1.0,), ((4, "mlp"),)),
            "has 1 numbers; the model's hidden states have 4",
        ),
        (
            STREAM,
            Direction((1.0,) * 4, ((4, "attention"),)),
            "layer 4 of this model has no attention",
        ),
        (
            STREAM,
            Direction((1.0,) * 4, ((1, "mlp"),), expert=0),
            "layer 1 of this model has no mlp",
        ),
        (
            Stream((Part((1, "mlp"), nn.Identity()),), {}),
            Direction((1.0,) * 4, ((1, "mlp"),), expert=0),
            "layer 1 of this model has no experts",
        ),
        (
            Stream((), {4: "it is scaled"}),
            Direction((1.0,) * 4, ((4, "mlp"),)),
            "layer 4 takes no directions in vLLM: it is scaled",
        ),
    ],
)
def test_directions_without_a_place_are_refused_when_they_are_loaded(
    stream: Stream, direction: Direction, said: str
) -> None:
    rows = make_rows(room=1)
    rows.directed = Directed(stream, rows.tables, 1, HIDDEN)
    with pytest.raises(MoesteerError, match=said):
        rows.load(payload_of(Profile(directions=(direction,))))


def test_directions_of_layers_that_another_worker_has_pass() -> None:
    rows = make_rows(room=1)
    profile = Profile(directions=(Direction((1.0,) * HIDDEN, ((7, "mlp"),)),))
    rows.load(payload_of(profile))
    begin(rows, request("r", profile))
    rows.after(None)
    assert rows.collect([profile.fingerprint])[profile.fingerprint]["directed"] == []
