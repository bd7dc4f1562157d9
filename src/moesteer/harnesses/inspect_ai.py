"""A steered model as a model of Inspect.

    inspect eval task.py --model moesteer/MODEL -M profile=FILE

Inspect finds this module by its entry point, and loads nothing large until a model is asked for.
Its samples ask one by one, all at the same time; they are answered in batches: whoever has the turn
takes along all that wait. What the profile did in a batch stands beside each of its replies, in
`output.metadata`; a batch in which it did not do what it promises fails its samples (DidNotFire).

Greedy unless a temperature is given. With a seed and a temperature each request runs alone, so that
its reply hangs on nothing else.
"""

import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from time import monotonic
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import anyio
import anyio.to_thread
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.model import (
    ChatMessage,
    ContentText,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    modelapi,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from moesteer.errors import MoesteerError

if TYPE_CHECKING:
    from moesteer.engines.base import Engine, Generation

MAX_TOKENS = 2048
"""Of a reply, where the task does not say and the context has room; Inspect's own default."""
GATHERING = 0.02
"""Seconds that a request waits for others to share its batch."""
OPTIONS = ("engine", "engine_option", "revision", "dtype", "device", "chat_template", "chat_option")
"""Model arguments that are options of moesteer's commands."""
LISTS = ("engine_option", "chat_option")
UNSUPPORTED = (
    *("top_p", "top_k", "num_choices", "best_of", "frequency_penalty", "presence_penalty"),
    *("logit_bias", "logprobs", "top_logprobs", "prompt_logprobs", "response_schema"),
    *("reasoning_effort", "reasoning_tokens", "effort", "extra_body", "modalities"),
)
"""What a request may not ask for, rather than be answered as if it had not."""

_loaded: "WeakValueDictionary[str, Engine]" = WeakValueDictionary()
_one_at_a_time = threading.Lock()


class Refused(MoesteerError, PrerequisiteError):  # noqa: N818 - it reads as what it says
    """A MoesteerError that the command `inspect` shows without a traceback."""


@modelapi(name="moesteer")
def moesteer() -> type[ModelAPI]:
    return SteeredAPI


@dataclass(frozen=True)
class _Settings:
    """Requests of the same settings share a batch; with a `seed`, none is shared."""

    max_tokens: int
    temperature: float
    seed: int | None


@dataclass(eq=False)
class _Request:
    prompt: str
    settings: _Settings
    stops: Sequence[str]
    output: ModelOutput | None = None
    error: Exception | None = None


class SteeredAPI(ModelAPI):
    """A model of moesteer's under a profile, or under none.

    `profile` is a file, `batch_size` how many requests share a batch. The others are the options of
    moesteer's commands: engine (transformers, vllm), engine_option, revision, dtype, device,
    chat_template (a file), chat_option (KEY=VALUE, or several).
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 - Inspect's signature
        profile: str | None = None,
        batch_size: int = 32,
        **options: Any,
    ) -> None:
        super().__init__(model_name, None, api_key, [], config)
        try:
            self._load(profile, batch_size, options)
        except MoesteerError as error:
            raise Refused(f"moesteer: {error}") from error
        # Inspect's cache of replies looks at the model's name and at base_url, not at its
        # arguments; this keeps steered and unsteered replies apart.
        told = repr((self._engine.facts, self._chat_options, options, self._fingerprint))
        self.base_url = f"moesteer:{sha256(told.encode()).hexdigest()[:16]}"
        self._waiting: list[_Request] = []
        self._turn = anyio.Lock()

    def _load(self, profile: str | None, batch_size: int, options: Mapping[str, Any]) -> None:
        from moesteer.chat import parse_chat_options
        from moesteer.generate import check_steers
        from moesteer.loading import ModelOptions, load_engine
        from moesteer.options import check_least
        from moesteer.profile import Profile
        from moesteer.profile_fit import check_model

        if wrong := [name for name in options if name not in OPTIONS]:
            names = ", ".join(("profile", "batch_size", *OPTIONS))
            raise MoesteerError(f"there is no model argument {wrong[0]!r}; there are {names}.")
        check_least(1, batch_size=batch_size)
        given = ModelOptions(
            **{k: _listed(v) if k in LISTS else v for k, v in options.items()}  # pyright: ignore
        )
        steering = None if profile is None else Profile.load(profile)
        check_steers(steering)
        # Models that differ in their profile alone share one engine; vLLM's has room for its own.
        key = repr((self.model_name, given, profile if given.engine == "vllm" else None))
        engine = _loaded.get(key)
        if engine is None:
            dense = steering is None or not steering.steered_layers
            engine = load_engine(self.model_name, given, steering, dense=dense)
            _loaded[key] = engine
        if steering is not None:
            check_model(steering, engine.facts)
        self._engine, self._profile, self._batch_size = engine, steering, batch_size
        own = {} if steering is None else steering.chat_options
        self._chat_options = own | parse_chat_options(given.chat_option or [])

    @property
    def _fingerprint(self) -> str | None:
        return None if self._profile is None else self._profile.fingerprint

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,
        config: GenerateConfig,
    ) -> ModelOutput:
        """See `ModelAPI.generate`. MoesteerError for tools, media and settings it can't obey."""
        if tools:
            raise MoesteerError(
                f"the tool {tools[0].name} can't be called: models of moesteer have no tools. Give"
                " a task without them."
            )
        request = self._request(input, config)
        self._waiting.append(request)
        try:
            await anyio.sleep(GATHERING)
            async with self._turn:
                if request in self._waiting:
                    batch = self._batch_of(request)
                    await anyio.to_thread.run_sync(self._run, batch)
        finally:
            if request in self._waiting:  # cancelled before its turn
                self._waiting.remove(request)
        if request.error is not None:
            raise request.error
        assert request.output is not None
        return request.output

    def max_connections(self) -> int:
        """As many as share a batch."""
        return self._batch_size

    def connection_key(self) -> str:
        """Models that differ in their profile don't wait for each other's connections."""
        return str(self.base_url)

    def _request(self, messages: Sequence[ChatMessage], config: GenerateConfig) -> _Request:
        from moesteer.chat import render_prompt
        from moesteer.contrast import Message

        asked = [name for name in UNSUPPORTED if getattr(config, name, None) not in (None, False)]
        if asked and not (asked == ["num_choices"] and config.num_choices == 1):
            raise MoesteerError(f"models of moesteer don't do {asked[0]}; leave it out.")
        turns = [Message(*_said(message)) for message in messages]
        if turns and turns[-1].role == "assistant":
            raise MoesteerError("the last message is the assistant's already.")
        prompt = render_prompt(turns, self._engine.tokenizer, self._chat_options)
        temperature = config.temperature or 0.0
        return _Request(
            prompt,
            _Settings(
                self._room(prompt, config.max_tokens),
                temperature,
                config.seed if temperature > 0 else None,
            ),
            config.stop_seqs or [],
        )

    def _room(self, prompt: str, wanted: int | None) -> int:
        """The longest reply in tokens; MoesteerError where the context has no room for it."""
        context, length = self._engine.max_tokens, self._tokens(prompt)
        if context is None:
            return wanted or MAX_TOKENS
        room = context - length
        if room < (wanted or 1):
            raise MoesteerError(
                f"a prompt of {length} tokens and a reply of {wanted or 1} exceed the model's"
                f" context of {context}. Lower max_tokens, or shorten the prompt."
            )
        return wanted or min(MAX_TOKENS, room)

    def _tokens(self, text: str) -> int:
        return len(self._engine.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _batch_of(self, request: _Request) -> list[_Request]:
        """The request and those that may share its batch; none of them waits any more."""
        alike = [r for r in self._waiting if r.settings == request.settings and r is not request]
        most = 1 if request.settings.seed is not None else self._batch_size
        batch = [request, *alike[: most - 1]]
        for chosen in batch:
            self._waiting.remove(chosen)
        return batch

    def _run(self, batch: Sequence[_Request]) -> None:
        """Answer a batch, in a thread of its own; every request gets its output or the error."""
        settings = batch[0].settings
        seed = random.randrange(2**31) if settings.seed is None else settings.seed
        began = monotonic()
        try:
            with _one_at_a_time:
                generated = self._engine.generate(
                    [request.prompt for request in batch],
                    self._profile,
                    max_new_tokens=settings.max_tokens,
                    temperature=settings.temperature,
                    seed=seed,
                    batch_size=len(batch),
                )
            for number, request in enumerate(batch):
                request.output = self._output(request, generated, number, seed)
                request.output.time = monotonic() - began
        except Exception as error:
            for request in batch:
                request.error = error

    def _output(
        self, request: _Request, generated: "Generation", number: int, seed: int
    ) -> ModelOutput:
        whole, settings = generated.replies[number], request.settings
        asked, said = self._tokens(request.prompt), self._tokens(whole)
        reply = min((whole.partition(stop)[0] for stop in request.stops), key=len, default=whole)
        cut = said >= settings.max_tokens and reply == whole
        output = ModelOutput.from_content(self.model_name, reply, "max_tokens" if cut else "stop")
        output.usage = ModelUsage(input_tokens=asked, output_tokens=said, total_tokens=asked + said)
        steered = self._profile is not None
        output.metadata = {
            "moesteer": {
                "profile": self._profile.name if self._profile is not None else None,
                "fingerprint": self._fingerprint,
                "steered": steered and (generated.steered is None or generated.steered[number]),
                "fired": [asdict(seen) | {"obeyed": seen.obeyed} for seen in generated.evidence],
                "batch": len(generated.replies),
                "seed": seed if settings.temperature > 0 else None,
            }
        }
        return output


def _said(message: ChatMessage) -> tuple[Any, str]:
    """Role and text of a message; MoesteerError for what is no text, and for tools' replies."""
    parts = [] if isinstance(message.content, str) else message.content
    if other := [part for part in parts if not isinstance(part, ContentText)]:
        raise MoesteerError(f"models of moesteer read text only, and here is {other[0].type}.")
    if message.role == "tool":
        raise MoesteerError("models of moesteer have no tools, and here is a tool's reply.")
    return message.role, message.text


def _listed(value: Any) -> list[str]:
    """What may be given once or several times."""
    return [str(one) for one in value] if isinstance(value, list | tuple) else [str(value)]
