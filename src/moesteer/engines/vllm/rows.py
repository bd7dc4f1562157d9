"""Which request has which row of the tables, step by step.

The worker learns of a request when it is first scheduled. A request that is steered or counted is
given a row; its profile's masks are written there, and each step says by row which tokens are its.
After the step, what the routers chose is added to the rows. Rows are folded into *results* under
the request's key when they are asked for or when the request ends.

A token is counted once, also where a preempted request runs through its prompt again.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from moesteer.engines.base import Counted
from moesteer.engines.evidence import is_guarded
from moesteer.engines.vllm.directions import Directed, Ready, Seen
from moesteer.engines.vllm.payload import profile_from
from moesteer.engines.vllm.readings import Readings
from moesteer.engines.vllm.tables import Tables
from moesteer.errors import MoesteerError
from moesteer.model_facts import LayerShape
from moesteer.profile import Profile

KEPT_RESULTS = 1024
"""Results that nobody asks for are dropped, the oldest first, beyond this many."""


logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Known:
    """What a profile does, and its masks [layer, expert] on the device, ready to be a row; `lifted`
    and `lowered` are the numbers of the layers where it activates and deactivates experts,
    `directed` what its directions do, or what a gate's probe watches, None where it has none."""

    does: Profile
    activated: Tensor
    deactivated: Tensor
    lifted: frozenset[int]
    lowered: frozenset[int]
    directed: Ready | None


@dataclass
class Request:
    """A running request of ours: `row` None while it has none; `counted_to`: first token not yet
    counted; `target`: positions that count, None for all; `keep`: positions whose
    prediction is to be read; `prompt`: how many tokens the prompt has; `unfolded`: whether it ran
    since its row was last folded; `watch`: the key under which to keep how its prompt was routed,
    None where nobody asks or it is kept already; `prompted`: what was folded of it so far."""

    id: str
    key: str
    prompt: int
    profile: Known | None
    counted: Counted
    target: np.ndarray | None
    keep: tuple[int, ...] = ()
    watch: str | None = None
    prompted: "Result | None" = None
    row: int | None = None
    counted_to: int = 0
    unfolded: bool = False


@dataclass(frozen=True)
class Run:
    """What one step ran of a request: its positions `start` … `end`, from `offset` in the batch."""

    request: Request
    start: int
    end: int
    offset: int


@dataclass
class Result:
    """What was counted under a key: tokens, by layer how many of them chose each expert, and what
    was measured of directions. On the device, so that nothing waits for it."""

    tokens: Tensor
    values: Tensor
    seen: Seen | None

    def add(self, tokens: Tensor, values: Tensor, seen: Seen | None) -> None:
        # Not in place: what was folded in a step is an inference tensor, and RPCs are outside.
        self.tokens = self.tokens + tokens
        self.values = self.values + values
        if self.seen is not None and seen is not None:
            self.seen.add(seen)


class Rows:
    """The requests of one worker, and the tables they are written to."""

    def __init__(
        self,
        tables: Tables,
        layers: Sequence[LayerShape],
        readings: Readings,
        directed: Directed | None,
    ) -> None:
        self.tables = tables
        self.directed = directed
        self.readings = readings
        self.layers = list(layers)
        self.known: dict[str, Known] = {}
        self.requests: dict[str, Request | None] = {}
        self.free = list(range(1, tables.tokens.shape[0]))
        self.results: OrderedDict[str, Result] = OrderedDict()
        # By key and request: how long each watched prompt is, and how it was routed
        self.prompts: OrderedDict[str, dict[str, tuple[int, Result]]] = OrderedDict()
        self._filled = 0  # tokens of the tables that hold rows of the last step
        self._step: list[Run] = []

    def load(self, payload: dict[str, Any]) -> None:
        """Know a profile from now on; that its experts exist is the frontend's to check.

        Raises MoesteerError for directions that this engine has no place for.
        """
        loaded, watched = profile_from(payload), payload.get("watched")
        if (loaded.directions or watched is not None) and self.directed is None:
            has = (
                "its gate reads the residual stream" if watched is not None else "it has directions"
            )
            raise MoesteerError(
                f"{has}, and the engine was started without room for directions. Start it with"
                ' additional_config={"moesteer": {"directions": 8}}, or with a profile that has'
                " some (--with, --profile)."
            )
        if self.directed is not None:
            self.directed.check(loaded.directions)
        known = self._ready(loaded)
        if watched is not None and self.directed is not None:
            vector = np.frombuffer(watched["vector"]).tolist()
            known = replace(known, directed=self.directed.watching(watched["layer"], vector))
        self.known[loaded.name] = known

    def forget(self, ended: Iterable[str]) -> None:
        """Requests that have ended: what they counted is kept under their keys."""
        for request_id in ended:
            request = self.requests.pop(request_id, None)
            if request is not None:
                self._release(request)

    def preempt(self, stopped: Iterable[str]) -> None:
        """Requests that will run through their tokens again: they keep what was counted."""
        for request_id in stopped:
            request = self.requests.get(request_id)
            if request is not None:
                self._release(request)

    def begin(
        self,
        request_ids: Sequence[str],
        scheduled: np.ndarray,
        computed: np.ndarray,
        extra_args: Callable[[str], dict[str, Any] | None],
    ) -> None:
        """Say whose tokens the next step runs: `scheduled` of each request, after `computed`."""
        for request_id in request_ids:
            if request_id not in self.requests:
                self.requests[request_id] = self._request(request_id, extra_args(request_id))
        batch = [self.requests[request_id] for request_id in request_ids]
        tables = self.tables
        self._step = []
        if not any(batch):
            self._nothing_to_do()
            return
        total, ends = int(scheduled.sum()), np.cumsum(scheduled)
        running = {request.row for request in batch if request is not None}
        rows, steered, counted_to = np.zeros((3, len(batch)), dtype=np.int64)
        spans = zip(computed.tolist(), scheduled.tolist(), ends.tolist(), strict=True)
        for place, (request, (start, number, end)) in enumerate(zip(batch, spans, strict=True)):
            if request is None:
                continue
            if request.row is None:
                request.row = self._row(running)
                running.add(request.row)
                self._write(request.row, request.profile)
            rows[place] = request.row
            steered[place] = request.row if request.profile is not None else 0
            counted_to[place] = request.counted_to
            self._step.append(Run(request, start, start + number, end - number))
        # From here on, a value for each token
        positions = np.arange(total) + np.repeat(computed - ends + scheduled, scheduled)
        by_token = np.repeat(rows, scheduled)
        counting = np.where(positions >= np.repeat(counted_to, scheduled), by_token, 0)
        directing = np.zeros_like(counting)
        for run in self._step:
            tokens = slice(run.offset, run.offset + run.end - run.start)
            if run.request.target is not None:
                counting[tokens] *= np.isin(positions[tokens], run.request.target)
            if run.request.profile is not None and run.request.profile.directed is not None:
                generated = positions[tokens] >= run.request.prompt
                directing[tokens] = 2 * by_token[tokens] + generated
        self._tell(tables.steering_rows, np.repeat(steered, scheduled))
        self._tell(tables.counting_rows, counting)
        profiles = {id(r.profile): r.profile for r in batch if r and r.profile}.values()
        if self.directed is not None:
            self._tell(self.directed.rows, directing)
            self.directed.use(p.directed for p in profiles if p.directed is not None)
        self._filled = total
        tables.lifted_layers = frozenset().union(*(p.lifted for p in profiles))
        tables.lowered_layers = frozenset().union(*(p.lowered for p in profiles))
        tables.any_paper = any(p.does.rule == "paper" for p in profiles)
        tables.any_partial = any(p.does.dose != 1 for p in profiles)
        tables.any_counted = bool(counting.any())
        tables.any_probability = any(r.counted == "probability" for r in batch if r)

    def after(self, hidden: Tensor | None) -> None:
        """Count what the routers chose in the step that has just run, and keep what was asked for.

        `hidden`: the final hidden states [token, hidden], where this worker has them.
        """
        tables, tokens = self.tables, self._filled
        if not self._step:
            return
        if tables.any_counted:
            rows = tables.counting_rows[:tokens]
            chosen = tables.chosen[:, :tokens].long()
            weights = tables.weights[:, :tokens]
            counts = (weights != 0) & (chosen >= 0) & (rows.view(1, -1, 1) > 0)
            if any(run.request.counted == "top-1" for run in self._step):
                first = torch.zeros_like(counts)
                first.scatter_(-1, weights.argmax(-1, keepdim=True), True)
                counts &= first | ~self._top_1_rows()[rows].view(1, -1, 1)
            number, experts = tables.selected.shape[1:]
            counts &= chosen < experts
            layer = torch.arange(number, device=rows.device).view(-1, 1, 1)
            # Row 0 is thrown away; all of it, so that a device does not add up at one address.
            cell = rows.view(1, -1, 1) * counts  # large: from here in place
            cell.mul_(number).add_(layer).mul_(experts).add_(chosen.clamp_(0, experts - 1))
            ones = torch.ones(1, dtype=torch.int32, device=rows.device).expand(cell.numel())
            tables.selected.view(-1).scatter_add_(0, cell.flatten(), ones)
            tables.tokens.scatter_add_(0, rows, torch.ones_like(rows, dtype=torch.int32))
        for run in self._step:
            request = run.request
            request.counted_to = max(request.counted_to, run.end)
            request.unfolded = True
            if hidden is not None:
                for position in request.keep:
                    if run.start < position <= run.end:
                        place = run.offset + position - 1 - run.start
                        self.readings.keep(request.key, position, hidden[place])
            if request.watch is not None and 0 < request.prompt <= run.end:
                self._keep_prompt(request, request.watch)
        self._step = []
        # A rank that waits for others runs made-up tokens now, which must not be added up.
        tables.any_probability = False
        if self.directed is not None:
            self.directed.rows[:tokens].zero_()

    def collect(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """What was counted under each key, which is counted from zero after that."""
        wanted = set(keys)
        for request in self.requests.values():
            if request is not None and request.key in wanted:
                self._fold(request)
        found = {}
        for key in wanted & set(self.results):
            result = self.results.pop(key)
            found[key] = {
                **self._selections(result),
                "directed": self._told(result),
                "watched": self._along_watched(result),
            }
        for key in wanted & set(self.prompts):
            nothing = {"tokens": 0, "selected": {}, "directed": [], "watched": None}
            found.setdefault(key, nothing)["prompts"] = {
                request_id: {"length": length, **self._selections(result)}
                for request_id, (length, result) in self.prompts.pop(key).items()
            }
        return found

    def _selections(self, result: Result) -> dict[str, Any]:
        values = result.values.tolist()
        return {
            "tokens": int(result.tokens),
            "selected": {
                shape.layer: values[number][: shape.experts]
                for number, shape in enumerate(self.layers)
            },
        }

    def _request(self, request_id: str, extra_args: dict[str, Any] | None) -> Request | None:
        ours = (extra_args or {}).get("moesteer")
        if not isinstance(ours, dict):
            return None
        fingerprint, count, keep = ours["fingerprint"], ours["count"], tuple(ours["keep"])
        profile = None if fingerprint is None else self.known.get(fingerprint)
        if fingerprint is not None and profile is None:
            # Raised here, it would end the engine. Uncounted, the request proves nothing.
            logger.error("a request names profile %s, which was never loaded here", fingerprint)
            return None
        counted, target = "top-k", None
        if count is not None:
            counted, spans = count["counted"], count["spans"]
            assert counted in get_args(Counted)
            target = np.concatenate([np.arange(start, end) for start, end in spans] or [[]])
        key, prompt, watch = ours["key"], ours["prompt"], ours.get("watch")
        return Request(request_id, key, prompt, profile, counted, target, keep, watch)

    def _ready(self, does: Profile) -> Known:
        numbers = {shape.layer: number for number, shape in enumerate(self.layers)}
        shape = self.tables.activated[:, 0].shape
        masks = []
        for experts in (does.activated, does.deactivated):
            mask = torch.zeros(shape, dtype=torch.bool)
            for layer, expert in experts:
                if layer in numbers:  # else another worker's
                    mask[numbers[layer], expert] = True
            masks.append(mask.to(self.tables.activated.device))
        lifted, lowered = (
            frozenset(numbers[layer] for layer, _ in experts if layer in numbers)
            for experts in (does.activated, does.deactivated)
        )
        ready = None
        if self.directed is not None and does.directions:
            ready = self.directed.ready(does.directions)
        return Known(does, masks[0], masks[1], lifted, lowered, ready)

    def _tell(self, table: Tensor, rows: np.ndarray) -> None:
        """Write the rows of the step's tokens, without waiting for the step before to end."""
        source = torch.from_numpy(rows)
        if table.is_cuda:
            source = source.pin_memory()
        table[: len(rows)].copy_(source, non_blocking=True)
        table[len(rows) : self._filled].zero_()

    def _row(self, running: set[int | None]) -> int:
        """A free row; where there is none, that of a request which does not run in this step."""
        if not self.free:
            for request in self.requests.values():
                if request is not None and request.row is not None and request.row not in running:
                    self._release(request)
                    break
            else:
                raise MoesteerError(
                    f"a step has more than {self.tables.tokens.shape[0] - 1} steered requests, the"
                    " most that this engine was started for."
                )
        return self.free.pop()

    def _write(self, row: int, known: Known | None) -> None:
        profile = Profile() if known is None else known.does
        if self.directed is not None:
            self.directed.write(row, None if known is None else known.directed)
        tables = self.tables
        if known is None:
            tables.activated[:, row].zero_()
            tables.deactivated[:, row].zero_()
        else:
            tables.activated[:, row].copy_(known.activated)
            tables.deactivated[:, row].copy_(known.deactivated)
        tables.promised[row] = is_guarded(profile)
        tables.paper[row] = profile.rule == "paper"
        tables.dose[row] = profile.dose

    def _release(self, request: Request) -> None:
        if request.row is not None:
            self._fold(request)
            self.free.append(request.row)
            request.row = None

    def _fold(self, request: Request) -> None:
        """Add what a row counted to the result of its key, and count from zero."""
        if request.row is None or not request.unfolded:
            return
        request.unfolded = False
        tables, row = self.tables, request.row
        source = tables.probability if request.counted == "probability" else tables.selected
        tokens, values = tables.tokens[row].clone(), source[row].clone()
        for table in (tables.tokens, tables.selected, tables.probability):
            table[row].zero_()
        ready = None if request.profile is None else request.profile.directed
        seen = None
        if self.directed is not None and ready is not None:
            seen = self.directed.take(row, ready)
        if request.watch is not None:  # nothing but its prompt has run yet
            if request.prompted is None:
                request.prompted = Result(tokens, values, None)
            else:
                request.prompted.add(tokens, values, None)
            if request.profile is None:
                return
        if request.key in self.results:
            self.results[request.key].add(tokens, values, seen)
            self.results.move_to_end(request.key)
        else:
            self.results[request.key] = Result(tokens, values, seen)
        while len(self.results) > KEPT_RESULTS:
            self.results.popitem(last=False)

    def _keep_prompt(self, request: Request, watch: str) -> None:
        """All of a watched prompt has run, and nothing else: keep how it was routed.

        What is only watched is let go of, so that generating costs nothing.
        """
        self._fold(request)
        request.watch = None
        if request.prompted is not None:
            kept = self.prompts.setdefault(watch, {})
            kept[request.id] = (request.prompt, request.prompted)
        while len(self.prompts) > KEPT_RESULTS:
            self.prompts.popitem(last=False)
        if request.profile is None:
            self._release(request)
            self.requests[request.id] = None

    def _told(self, result: Result) -> list[list[Any]]:
        """What each direction did at each of its sites: see `Directed.told`."""
        if self.directed is None or result.seen is None:
            return []
        return self.directed.told(result.seen)

    def _along_watched(self, result: Result) -> float | None:
        if self.directed is None or result.seen is None:
            return None
        return self.directed.along_watched(result.seen)

    def _top_1_rows(self) -> Tensor:
        rows = torch.zeros(self.tables.tokens.shape[0], dtype=torch.bool)
        rows[[r.request.row for r in self._step if r.request.counted == "top-1"]] = True
        return rows.to(self.tables.tokens.device)

    def _nothing_to_do(self) -> None:
        tables = self.tables
        if self._filled:
            tables.steering_rows[: self._filled].zero_()
            tables.counting_rows[: self._filled].zero_()
            if self.directed is not None:
                self.directed.rows[: self._filled].zero_()
                self.directed.use(())
            self._filled = 0
        tables.lifted_layers = tables.lowered_layers = frozenset()
        tables.any_counted = tables.any_paper = tables.any_partial = False
        tables.any_probability = False
