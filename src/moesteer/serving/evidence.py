"""What the workers counted of one request, and whether it proves that its profile fired.

Each steered request has a random key, under which the workers keep what its tokens selected, and
how far they moved along directions. What
the workers of one engine say is put together by `merged`. The parts of a request (n > 1) may run in
several engines, where there is data parallelism: those are added up.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moesteer.engines.evidence import check_fired
from moesteer.engines.vllm.collected import (
    Counts,
    Moves,
    Prompted,
    directions_of,
    evidence_of,
    merged,
    plus,
    prompts_of,
)
from moesteer.errors import DidNotFire
from moesteer.profile import Profile


@dataclass(frozen=True)
class Count:
    """`tokens` of a request passed the routers; `selected` says by layer how many chose each,
    `moves` what its directions did, `prompts` how watched prompts were routed."""

    tokens: int = 0
    selected: Counts = field(default_factory=dict)
    moves: Moves = field(default_factory=dict)
    prompts: tuple[Prompted, ...] = ()

    def __add__(self, other: "Count") -> "Count":
        selected = dict(self.selected)
        for layer, counts in other.selected.items():
            before = selected.get(layer, [0] * len(counts))
            selected[layer] = [a + b for a, b in zip(before, counts, strict=True)]
        moves, prompts = plus(self.moves, other.moves), self.prompts + other.prompts
        return Count(self.tokens + other.tokens, selected, moves, prompts)


class Workers:
    """The worker processes behind vLLM's engine client, called by name."""

    def __init__(self, engine_client: Any) -> None:
        self._client = engine_client

    async def call(self, method: str, *args: Any) -> list[list[Any]]:
        """What each worker answers, by engine."""
        core = getattr(self._client, "engine_core", None)
        everywhere = getattr(core, "call_utility_all_async", None)
        if everywhere is None:
            return [await self._client.collective_rpc(method, args=args)]
        # With data parallelism `collective_rpc` asks all engines and tells what one of them said.
        return await everywhere("collective_rpc", method, None, args, None)


class Collector:
    """Asks the workers for the evidence of many requests at once.

    What is asked for while an answer is on its way goes into the next call together: with many
    replies that end at the same time, the workers are interrupted once.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._asked: dict[str, asyncio.Future[Count]] = {}
        self._asking: asyncio.Task[None] | None = None

    async def collect(self, key: str) -> Count:
        """What was counted under the key since it was asked for last."""
        answer = self._asked.setdefault(key, asyncio.get_running_loop().create_future())
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        return await answer

    async def _ask(self) -> None:
        while self._asked:
            asked, self._asked = self._asked, {}
            try:
                engines = await self._workers.call("moesteer_collect", list(asked))
                found = {key: counted(engines, key) for key in asked}
            except Exception as failure:  # whatever went wrong, it is theirs to tell who waits
                for answer in asked.values():
                    if not answer.done():
                        answer.set_exception(failure)
                continue
            for key, answer in asked.items():
                if not answer.done():  # the request that asked may be gone
                    answer.set_result(found[key])


def counted(engines: Sequence[Sequence[dict[str, Any]]], key: str) -> Count:
    """One request's count, from the answers of `moesteer_collect` by engine and worker."""
    return sum(
        (Count(*merged(workers, key), tuple(prompts_of(workers, key))) for workers in engines),
        Count(),
    )


def why_not_fired(profile: Profile, count: Count) -> str | None:
    """None where the count proves that the profile steered; else what is wrong."""
    if not count.tokens:
        return f"{profile.name}: no token of the request was counted."
    try:
        check_fired(profile, evidence_of(profile, count.tokens, count.selected, count.moves))
    except DidNotFire as failure:
        return str(failure)
    return None


def is_telling(profile: Profile, count: Count) -> bool:
    """Whether there are tokens to go by: some, and some in the window of each direction."""
    return count.tokens > 0 and all(seen.tokens for seen in directions_of(profile, count.moves))
