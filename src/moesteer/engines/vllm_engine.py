"""The vLLM engine: the same profiles on a stock vLLM, each request of a batch by its own.

Everything that happens inside vLLM's processes is in `moesteer.engines.vllm`; this is the side of
the caller. Gradients can't be had from vLLM, nor what its layers and experts put out, so whatever
asks for these is refused.
"""

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int, Num

from moesteer.chat import TokenisedConversation
from moesteer.engines.base import Contributions, Counted, Generation, TokenGradient
from moesteer.engines.checkpoint import read_tokenizer, resolve
from moesteer.engines.evidence import DirectionEvidence, LayerEvidence, check_fired
from moesteer.engines.facts import facts_of_checkpoint
from moesteer.engines.opening import (
    behind_gates,
    divergence_behind_gate,
    has_gate,
    read_behind_gates,
)
from moesteer.engines.prompts import check_lengths, check_projection, one_each
from moesteer.engines.readouts import (
    Readout,
    check_readouts,
    mean_log_probability,
    reaching,
)
from moesteer.engines.vllm import names_of, send, send_profile
from moesteer.engines.vllm.collected import (
    Moves,
    check_described,
    directions_of,
    evidence_of,
    layers_of,
    merged,
    plus,
    score_of,
)
from moesteer.engines.vllm.directions import room_for
from moesteer.engines.vllm.names import COUNT, EVIDENCE_KEY, KEEP
from moesteer.engines.vllm.payload import payload_of_probe
from moesteer.engines.vllm.rows import KEPT_RESULTS
from moesteer.engines.vllm.settings import KEY, with_room
from moesteer.errors import DidNotFire, MoesteerError
from moesteer.gate import DirectionProbe
from moesteer.model_facts import ModelFacts
from moesteer.profile import Profile
from moesteer.profile_fit import check_model
from moesteer.records import first_line

if TYPE_CHECKING:
    from torch import Tensor

ON_CPU = {"enforce_eager": True, "kv_cache_memory_bytes": 2**30}
"""On a CPU: no minute of compiling, and not most of the memory for the KV cache."""


class VllmEngine:
    """A running `vllm.LLM` and what is known of its model."""

    def __init__(self, llm: Any, tokenizer: Any, facts: ModelFacts) -> None:
        self.llm = llm
        self.tokenizer = tokenizer
        self.facts = facts
        self.max_tokens: int | None = llm.llm_engine.model_config.max_model_len
        self._names = names_of(llm)
        self._names.internal = frozenset({EVIDENCE_KEY, COUNT, KEEP})
        self._loaded: set[str] = set()
        self._calls = itertools.count()
        described = llm.collective_rpc("moesteer_describe")
        check_described(described, facts)
        self._static = any(worker["static"] for worker in described)

    def count_selections(
        self, conversations: Sequence[TokenisedConversation], counted: Counted = "top-k"
    ) -> Num[np.ndarray, "conversation layer expert"]:
        """See `Engine.count_selections`. Each conversation is a request of one prefill."""
        if counted == "probability" and self._static:
            raise MoesteerError(
                "router probabilities can't be summed where vLLM replays CUDA graphs. Start it with"
                " --engine-option enforce_eager=true, or use a detector that counts selections."
            )
        if len(conversations) > KEPT_RESULTS:
            halves = np.array_split(np.arange(len(conversations)), 2)
            parts = [[conversations[i] for i in half] for half in halves]
            return np.concatenate([self.count_selections(part, counted) for part in parts])
        call = next(self._calls)
        keys = [f"count-{call}-{number}" for number in range(len(conversations))]
        asked = [
            {EVIDENCE_KEY: key, COUNT: {"counted": counted, "spans": _spans(c.target)}}
            for key, c in zip(keys, conversations, strict=True)
        ]
        self._prefill([c.ids for c in conversations], asked)
        by_worker = self.llm.collective_rpc("moesteer_collect", args=(keys,))
        layers = self.facts.layers
        widest = max((shape.experts for shape in layers), default=0)
        dtype = np.float32 if counted == "probability" else np.int64
        result = np.zeros((len(conversations), len(layers), widest), dtype=dtype)
        for number, (key, conversation) in enumerate(zip(keys, conversations, strict=True)):
            tokens, counts, _ = merged(by_worker, key)
            if tokens != sum(conversation.target):
                raise MoesteerError(
                    f"conversation {number + 1} has {sum(conversation.target)} target tokens, but"
                    f" vLLM counted {tokens}."
                )
            for row, shape in enumerate(layers if tokens else ()):
                result[number, row, : shape.experts] = counts[shape.layer]
        return result

    def generate(
        self,
        prompts: Sequence[str],
        profiles: Profile | Sequence[Profile | None] | None = None,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 64,
        progress: Callable[[int], None] | None = None,
    ) -> Generation:
        """See `Engine.generate`. vLLM schedules for itself, so `batch_size` is not needed."""
        from vllm import SamplingParams

        by_prompt = one_each(profiles, len(prompts))
        for profile in {id(p): p for p in by_prompt if p is not None}.values():
            check_model(profile, self.facts)
        encoded = [self.tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
        check_lengths(encoded, max_new_tokens, self.max_tokens)
        by_prompt, steered = behind_gates(self, encoded, by_prompt, KEPT_RESULTS)
        distinct = {id(p): p for p in by_prompt if p is not None and p.steers}
        asked = self._asked(distinct)
        params = [
            SamplingParams(
                max_tokens=max_new_tokens,
                temperature=temperature,
                seed=None if temperature == 0 else seed + number,
                detokenize=False,
                extra_args=asked.get(id(profile)),
            )
            for number, profile in enumerate(by_prompt)
        ]
        outputs = self._run(encoded, params, progress)
        replies = [
            self.tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True)
            for output in outputs
        ]
        evidence = self._evidence(distinct, asked)
        return Generation(replies, evidence, steered)

    def read(
        self,
        readouts: Sequence[Readout],
        profiles: Sequence[Profile | None] = (None,),
        *,
        progress: Callable[[int], None] | None = None,
    ) -> Float[np.ndarray, "profile readout"]:
        """See `Engine.read`. Each text is a request of one prefill under each profile."""
        self._check(readouts, profiles)
        if has_gate(profiles):
            return read_behind_gates(self, readouts, profiles, progress)
        values = np.zeros((len(profiles), len(readouts)))
        waiting = [number for number, readout in enumerate(readouts) if readout.terms]
        for row, profile in enumerate(profiles):
            if progress is not None:
                progress(len(readouts) - len(waiting))
            texts = [readouts[number] for number in waiting]
            keys = self._kept(texts, _reaching(profile, texts), progress)
            asked = [
                (key, term.position, term.token)
                for key, text in zip(keys, texts, strict=True)
                for term in text.terms
            ]
            logs = self._first("moesteer_log_probabilities", asked)
            weights = [term.weight for text in texts for term in text.terms]
            numbers = np.repeat(waiting, [len(text.terms) for text in texts])
            np.add.at(values[row], numbers, np.array(weights) * np.array(logs))
            self.llm.collective_rpc("moesteer_drop", args=(keys,))
        return values

    def gate_gradients(
        self, readouts: Sequence[Readout]
    ) -> Float[np.ndarray, "readout layer expert"]:
        """Not to be had from vLLM: raises MoesteerError."""
        raise _no_gradients()

    def divergence(
        self, conversations: Sequence[TokenisedConversation], profile: Profile
    ) -> Float[np.ndarray, " conversation"]:
        """See `Engine.divergence`."""
        texts = [mean_log_probability(conversation) for conversation in conversations]
        self._check(texts, [profile])
        if profile.gate is not None:
            return divergence_behind_gate(self, conversations, profile)
        before, after = self._kept(texts, None), self._kept(texts, _reaching(profile, texts))
        asked = [
            (p, q, term.position)
            for p, q, text in zip(before, after, texts, strict=True)
            for term in text.terms
        ]
        found = np.array(self._first("moesteer_divergences", asked))
        self.llm.collective_rpc("moesteer_drop", args=(before + after,))
        ends = np.cumsum([len(text.terms) for text in texts])
        return np.array([part.mean() for part in np.split(found, ends[:-1])])

    def residuals(
        self, texts: Sequence[Sequence[int]], last: int
    ) -> Float[np.ndarray, "text layer position hidden"]:
        """Not to be had from vLLM: raises MoesteerError."""
        raise _inside("what enters each layer")

    def project(
        self, texts: Sequence[Sequence[int]], layer: int, position: int, vector: Sequence[float]
    ) -> Float[np.ndarray, " text"]:
        """See `Engine.project`. Each text is a request of one prefill."""
        check_projection(texts, layer, position, vector, self.facts)
        length = float(np.linalg.norm(vector))
        if not length:
            return np.zeros(len(texts))
        probe = DirectionProbe(layer, position, tuple(number / length for number in vector))
        payload = payload_of_probe(probe)
        name = payload["fingerprint"]
        if name not in self._loaded:
            send(self.llm, payload)
            self._names.add_probe(name, probe)
            self._loaded.add(name)
        call = next(self._calls)
        keys = [f"project-{call}-{number}" for number in range(len(texts))]
        found: list[float] = []
        for start in range(0, len(texts), KEPT_RESULTS):
            part = slice(start, start + KEPT_RESULTS)
            asked = [{KEY: name, EVIDENCE_KEY: key} for key in keys[part]]
            self._prefill(texts[part], asked)
            by_worker = self.llm.collective_rpc("moesteer_collect", args=(keys[part],))
            for number, key in enumerate(keys[part], start=start + 1):
                along = score_of(probe, by_worker, key)
                if along is None:
                    raise MoesteerError(f"vLLM did not read layer {layer} of text {number}.")
                found.append(length * along)
        return np.array(found)

    def forced_outputs(
        self, texts: Sequence[Sequence[int]], layer: int, last: int
    ) -> Float[np.ndarray, "text expert position hidden"]:
        """Not to be had from vLLM: raises MoesteerError."""
        raise _inside("what experts put out")

    def own_outputs(
        self, texts: Sequence[Sequence[int]], layer: int, last: int
    ) -> tuple[Float[np.ndarray, "text expert hidden"], Int[np.ndarray, "text expert"]]:
        """Not to be had from vLLM: raises MoesteerError."""
        raise _inside("what experts put out")

    def contributions(
        self, texts: Sequence[Sequence[int]], last: int, vector: Sequence[float]
    ) -> Contributions:
        """Not to be had from vLLM: raises MoesteerError."""
        raise _inside("what each part writes to the residual stream")

    def token_gradients(
        self,
        readouts: Sequence[Readout],
        profile: Profile | None = None,
        *,
        gates: bool = False,
        checkpointing: bool = False,
    ) -> Iterator[tuple[int, TokenGradient]]:
        """Not to be had from vLLM: raises MoesteerError."""
        raise _no_gradients()

    def integrated_gradients(
        self,
        readouts: Sequence[Readout],
        positions: Sequence[Sequence[int]],
        profile: Profile | None = None,
        *,
        steps: int = 64,
        tolerance: float = 0.01,
        checkpointing: bool = False,
    ) -> "Iterator[tuple[int, Tensor, float]]":
        """Not to be had from vLLM: raises MoesteerError."""
        raise _no_gradients()

    def attention_maps(
        self, readouts: Sequence[Readout], profile: Profile | None = None
    ) -> "Iterator[tuple[int, Tensor]]":
        """Not to be had from vLLM: raises MoesteerError."""
        raise _inside("attention weights")

    def weigh_selections(
        self,
        texts: Sequence[Sequence[int]],
        table: Float[np.ndarray, "layer expert"],
        profile: Profile | None = None,
    ) -> list[Float[np.ndarray, " token"]]:
        """Not to be had from vLLM: raises MoesteerError."""
        raise _inside("which experts each token selects")

    def _check(self, readouts: Sequence[Readout], profiles: Sequence[Profile | None]) -> None:
        longest = None if self.max_tokens is None else self.max_tokens - 1  # vLLM adds a token
        vocabulary = self.llm.llm_engine.model_config.get_vocab_size()
        check_readouts(readouts, vocabulary, longest)
        for profile in {id(p): p for p in profiles if p is not None}.values():
            check_model(profile, self.facts)

    def _kept(
        self,
        texts: Sequence[Readout],
        profile: Profile | None,
        progress: Callable[[int], None] | None = None,
    ) -> list[str]:
        """Run texts with what predicts their terms kept by the workers; the keys it is kept under.

        Raises DidNotFire where the profile is not proved to have steered.
        """
        call = next(self._calls)
        steering = profile if profile is not None and profile.steers else None
        named = {} if steering is None else {KEY: self._load(steering)}
        keys = [f"kept-{call}-{number}" for number in range(len(texts))]
        asked = [
            {
                EVIDENCE_KEY: key,
                KEEP: sorted({term.position for term in text.terms}),
                **named,
            }
            for key, text in zip(keys, texts, strict=True)
        ]
        moves: Moves = {}
        for start in range(0, len(texts), KEPT_RESULTS):
            part = slice(start, start + KEPT_RESULTS)
            self._prefill([text.ids for text in texts[part]], asked[part], progress)
            by_worker = self.llm.collective_rpc("moesteer_collect", args=(keys[part],))
            if steering is None:
                continue
            for key in keys[part]:
                tokens, counts, moved = merged(by_worker, key)
                check_fired(steering, layers_of(steering, tokens, counts))
                moves = plus(moves, moved)  # together: not each text has tokens in each window
        if steering is not None:
            check_fired(steering, directions_of(steering, moves))
        return keys

    def _prefill(
        self,
        texts: Sequence[Sequence[int]],
        extra_args: Sequence[dict[str, Any]],
        progress: Callable[[int], None] | None = None,
    ) -> None:
        from vllm import SamplingParams

        params = [
            SamplingParams(
                max_tokens=1,
                temperature=0,
                detokenize=False,
                skip_reading_prefix_cache=True,  # cached tokens pass no router
                extra_args=extra,
            )
            for extra in extra_args
        ]
        self._run(texts, params, progress)

    def _run(
        self,
        texts: Sequence[Sequence[int]],
        params: Sequence[Any],
        progress: Callable[[int], None] | None,
    ) -> list[Any]:
        """Outputs in the order of the texts."""
        prompts = [{"prompt_token_ids": list(ids)} for ids in texts]
        started = self.llm.enqueue(prompts, list(params), use_tqdm=False)
        engine, finished = self.llm.llm_engine, []
        try:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        finished.append(output)
                        if progress is not None:
                            progress(1)
        except BaseException:
            engine.abort_request(started, internal=True)
            raise
        return sorted(finished, key=lambda output: int(output.request_id))  # as they were started

    def _asked(self, distinct: Mapping[int, Profile]) -> dict[int, dict[str, str]]:
        """What requests say to run under each profile, and the key of its evidence in one call."""
        call = next(self._calls)
        return {
            which: {KEY: self._load(profile), EVIDENCE_KEY: f"run-{call}-{number}"}
            for number, (which, profile) in enumerate(distinct.items())
        }

    def _evidence(
        self, distinct: Mapping[int, Profile], asked: Mapping[int, dict[str, str]]
    ) -> list[LayerEvidence | DirectionEvidence]:
        """What each profile did under its key; DidNotFire where that proves nothing."""
        if not distinct:
            return []
        keys = [asked[which][EVIDENCE_KEY] for which in distinct]
        by_worker = self.llm.collective_rpc("moesteer_collect", args=(keys,))
        evidence = []
        for key, profile in zip(keys, distinct.values(), strict=True):
            seen = evidence_of(profile, *merged(by_worker, key))
            check_fired(profile, seen)
            evidence += seen
        return evidence

    def _load(self, profile: Profile) -> str:
        """The name by which requests ask for the profile; the workers know it then."""
        name = profile.fingerprint
        if name not in self._loaded:
            send_profile(self.llm, profile)
            self._names.add(name, profile)
            self._loaded.add(name)
        return name

    def _first(self, call: str, asked: list[tuple]) -> list[float]:
        """The answer of the worker that has the LM head."""
        if not asked:
            return []
        answers = [a for a in self.llm.collective_rpc(call, args=(asked,)) if a is not None]
        if not answers:
            raise DidNotFire(f"no worker of vLLM answered {call}.")
        return answers[0]


def load_vllm(
    model: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    chat_template: str | None = None,
    options: Mapping[str, Any] | None = None,
    profiles: Iterable[Profile] = (),
) -> VllmEngine:
    """Start vLLM on a model by its name on the Hub, a folder, or `testbed`.

    `options` are vLLM's own engine arguments; on a CPU, `ON_CPU` holds otherwise. With dtype auto
    the model runs in the dtype of its weights, as in transformers. Of `profiles`, those that the
    engine is for, it is only asked whether they have directions: then it is started with room for
    them. Raises MoesteerError where vLLM is not installed, does not start, or can't be steered.
    """
    try:
        import vllm
    except ImportError:
        raise MoesteerError(
            "vLLM is not installed. Install moesteer[vllm], or leave out --engine vllm."
        ) from None
    from pydantic import ValidationError
    from vllm import EngineArgs
    from vllm.platforms import current_platform

    room = room_for(profiles)
    path = resolve(model)
    facts = facts_of_checkpoint(
        model, revision=revision, chat_template=chat_template, dense=room > 0
    )
    if dtype != "auto":
        facts = replace(facts, dtype=dtype)
    arguments: dict[str, Any] = {
        "dtype": facts.dtype,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if current_platform.is_cpu():
        arguments |= ON_CPU
    arguments |= dict(options or {})
    if room:
        arguments["additional_config"] = with_room(arguments.get("additional_config"), room)
    known = {field.name for field in fields(EngineArgs)}
    for name in sorted(set(arguments) - known):
        raise MoesteerError(f"vLLM {vllm.__version__} has no engine argument {name}.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's own, of which there are many
        try:
            llm = vllm.LLM(path, revision=revision, **arguments)
        except ValidationError as error:
            first = error.errors()[0]
            where = "".join(f"{part}: " for part in first["loc"])
            raise MoesteerError(f"vLLM can't run {model}: {where}{first['msg']}") from None
        except Exception as error:  # whatever else vLLM says of models and machines
            raise MoesteerError(f"vLLM can't run {model}: {first_line(error)}") from error
    return VllmEngine(llm, read_tokenizer(path, revision, chat_template), facts)


def _no_gradients() -> MoesteerError:
    return MoesteerError("vLLM computes no gradients; use --engine transformers for them.")


def _inside(what: str) -> MoesteerError:
    return MoesteerError(f"vLLM does not show {what}; use --engine transformers for it.")


def _reaching(profile: Profile | None, texts: Sequence[Readout]) -> Profile | None:
    places = [[term.position for term in text.terms] for text in texts]
    return profile and reaching(profile, any(max(of) > min(of) for of in places))


def _spans(target: Sequence[bool]) -> list[list[int]]:
    """Start and end of each run of target tokens."""
    edges = np.flatnonzero(np.diff(np.r_[0, np.array(target, dtype=np.int8), 0]))
    return edges.reshape(-1, 2).tolist()
