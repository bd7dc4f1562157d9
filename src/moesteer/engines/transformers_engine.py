"""The transformers engine: any MoE causal LM that `AutoModelForCausalLM` can load."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from moesteer.chat import TokenisedConversation
from moesteer.engines.base import Contributions, Counted, Generation, TokenGradient
from moesteer.engines.checkpoint import (
    adapter_base,
    commit_of,
    read_config,
    read_tokenizer,
    resolve,
    without_weights,
)
from moesteer.engines.evidence import DirectionEvidence, LayerEvidence, summed
from moesteer.engines.facts import facts_of_model
from moesteer.engines.opening import (
    behind_gates,
    divergence_behind_gate,
    has_gate,
    read_behind_gates,
)
from moesteer.engines.prompts import check_lengths, check_projection, one_each
from moesteer.engines.readouts import Readout, check_readouts, mean_log_probability
from moesteer.engines.transformers.adapters import load_adapter, require_peft
from moesteer.engines.transformers.attention_maps import attention_maps
from moesteer.engines.transformers.contributions import contributions
from moesteer.engines.transformers.expert_outputs import forced_outputs, own_outputs
from moesteer.engines.transformers.gates import gate_gradients
from moesteer.engines.transformers.integrated import integrated_gradients
from moesteer.engines.transformers.reading import divergence, padded, read, vocabulary_of
from moesteer.engines.transformers.replay import Replay
from moesteer.engines.transformers.residuals import entering, last_tokens
from moesteer.engines.transformers.routers import (
    MoELayer,
    describe,
    find_routers,
    input_device,
    is_dense,
)
from moesteer.engines.transformers.seam import (
    ProbabilitySums,
    SelectionCounts,
    observe,
    observe_logits,
)
from moesteer.engines.transformers.selections import weigh_selections
from moesteer.engines.transformers.splitting import (
    Split,
    check_whole,
    distributed_config,
    processes_of,
)
from moesteer.engines.transformers.steering import UNSTEERED, checked_layers, steer
from moesteer.engines.transformers.stream import Stream, find_stream
from moesteer.engines.transformers.token_gradients import Subject, token_gradients
from moesteer.errors import MoesteerError
from moesteer.profile import Profile
from moesteer.profile_fit import check_model, check_ungated
from moesteer.records import first_line


class TransformersEngine:
    """A model of transformers, its tokenizer and its routed layers, found and self-tested."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        id: str | None = None,
        revision: str | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.layers: list[MoELayer] = [] if is_dense(model) else checked_layers(model)
        self.facts = facts_of_model(
            model, tokenizer, self.layers, id=id or str(model.name_or_path), revision=revision
        )
        self._replay = Replay(model, self.layers)
        self.max_tokens: int | None = getattr(
            model.config.get_text_config(), "max_position_embeddings", None
        )
        if processes_of(model) > 1:  # all run the model, and so all look now
            _ = self._sought_stream

    @property
    def stream(self) -> Stream:
        """The model's residual stream; MoesteerError where its layers don't add up."""
        if isinstance(self._sought_stream, MoesteerError):
            raise self._sought_stream
        return self._sought_stream

    @cached_property
    def _sought_stream(self) -> Stream | MoesteerError:
        """The stream, or why there is none: it is looked for once, with a run of the model."""
        try:
            return find_stream(self.model, self.layers)
        except MoesteerError as error:
            return error

    @torch.inference_mode()
    def count_selections(
        self, conversations: Sequence[TokenisedConversation], counted: Counted = "top-k"
    ) -> Num[np.ndarray, "conversation layer expert"]:
        """See `Engine.count_selections`. One forward pass without the LM head."""
        self._check_routed()
        ids, attention = padded([c.ids for c in conversations], input_device(self.model))
        target = padded([c.target for c in conversations], ids.device)[0].bool()
        # Tokens outside the target count in one slot more, which is dropped.
        rows = torch.arange(len(conversations), device=ids.device).unsqueeze(-1)
        slots = torch.where(target, rows, len(conversations)).flatten()
        with ExitStack() as stack:
            counts = [
                _count(layer, slots, len(conversations) + 1, counted, stack)
                for layer in self.layers
            ]
            self.model.base_model(input_ids=ids, attention_mask=attention, use_cache=False)
        widest = max(layer.num_experts for layer in self.layers)
        tables = [layer_counts.table()[:-1].cpu().numpy() for layer_counts in counts]
        result = np.zeros((len(conversations), len(self.layers), widest), dtype=tables[0].dtype)
        for position, table in enumerate(tables):
            result[:, position, : table.shape[1]] = table
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
        """See `Engine.generate`. Prompts of similar length share a left-padded batch."""
        by_prompt = one_each(profiles, len(prompts))
        for profile in {id(p): p for p in by_prompt if p is not None}.values():
            check_model(profile, self.facts)
        encoded = [self.tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
        check_lengths(encoded, max_new_tokens, self.max_tokens)
        by_prompt, steered = behind_gates(self, encoded, by_prompt, batch_size)
        order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
        replies = [""] * len(prompts)
        evidence: list[LayerEvidence | DirectionEvidence] = []
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            texts, seen = self._generate_batch(
                [encoded[i] for i in chosen],
                [by_prompt[i] for i in chosen],
                max_new_tokens,
                temperature,
            )
            for i, text in zip(chosen, texts, strict=True):
                replies[i] = text
            evidence += seen
            if progress is not None:
                progress(len(chosen))
        return Generation(replies, summed(evidence), steered)

    def read(
        self,
        readouts: Sequence[Readout],
        profiles: Sequence[Profile | None] = (None,),
        *,
        progress: Callable[[int], None] | None = None,
    ) -> Float[np.ndarray, "profile readout"]:
        """See `Engine.read`."""
        self._check(readouts, profiles)
        if has_gate(profiles):
            return read_behind_gates(self, readouts, profiles, progress)
        stream = self._stream_for(profiles)
        return read(self.model, self.layers, stream, self._replay, readouts, profiles, progress)

    def gate_gradients(
        self, readouts: Sequence[Readout]
    ) -> Float[np.ndarray, "readout layer expert"]:
        """See `Engine.gate_gradients`."""
        self._check_routed()
        self._check(readouts)
        return gate_gradients(self.model, self.layers, readouts)

    def divergence(
        self, conversations: Sequence[TokenisedConversation], profile: Profile
    ) -> Float[np.ndarray, " conversation"]:
        """See `Engine.divergence`."""
        texts = [mean_log_probability(conversation) for conversation in conversations]
        self._check(texts, [profile])
        if profile.gate is not None:
            return divergence_behind_gate(self, conversations, profile)
        stream = self._stream_for([profile])
        return divergence(self.model, self.layers, stream, self._replay, texts, profile)

    @torch.inference_mode()
    def residuals(
        self, texts: Sequence[Sequence[int]], last: int
    ) -> Float[np.ndarray, "text layer position hidden"]:
        """See `Engine.residuals`."""
        ids, attention, places = last_tokens(texts, last, input_device(self.model))
        with entering(self.stream.decoder, places) as found:
            self.model.base_model(input_ids=ids, attention_mask=attention, use_cache=False)
        return torch.stack([layer.cpu() for layer in found], dim=1).numpy()

    @torch.inference_mode()
    def project(
        self, texts: Sequence[Sequence[int]], layer: int, position: int, vector: Sequence[float]
    ) -> Float[np.ndarray, " text"]:
        """See `Engine.project`."""
        check_projection(texts, layer, position, vector, self.facts)
        ids, attention, places = last_tokens(texts, -position, input_device(self.model))
        with entering(self.stream.decoder[layer : layer + 1], places[:, :1]) as found:
            self.model.base_model(input_ids=ids, attention_mask=attention, use_cache=False)
        line = torch.tensor(vector, dtype=torch.float32)
        return (found[0][:, 0].cpu() @ line).numpy()

    def forced_outputs(
        self, texts: Sequence[Sequence[int]], layer: int, last: int
    ) -> Float[np.ndarray, "text expert position hidden"]:
        """See `Engine.forced_outputs`."""
        routed, stream = self._routed(layer), self.stream
        return forced_outputs(self.model, self.layers, stream, self._replay, routed, texts, last)

    def own_outputs(
        self, texts: Sequence[Sequence[int]], layer: int, last: int
    ) -> tuple[Float[np.ndarray, "text expert hidden"], Int[np.ndarray, "text expert"]]:
        """See `Engine.own_outputs`."""
        return own_outputs(self.model, self._routed(layer), texts, last, self.stream.hidden)

    def contributions(
        self, texts: Sequence[Sequence[int]], last: int, vector: Sequence[float]
    ) -> Contributions:
        """See `Engine.contributions`."""
        return contributions(self.model, self.layers, self.stream, texts, last, vector)

    def token_gradients(
        self,
        readouts: Sequence[Readout],
        profile: Profile | None = None,
        *,
        gates: bool = False,
        checkpointing: bool = False,
    ) -> Iterator[tuple[int, TokenGradient]]:
        """See `Engine.token_gradients`."""
        if gates:
            self._check_routed()
        self._check(readouts, [profile])
        subject = self._subject(profile, checkpointing)
        return token_gradients(subject, readouts, gates=gates)

    def attention_maps(
        self, readouts: Sequence[Readout], profile: Profile | None = None
    ) -> Iterator[tuple[int, Float[Tensor, "layer token token"]]]:
        """See `Engine.attention_maps`. Switches attention to eager, with a warning, and back."""
        self._check(readouts, [profile])
        return attention_maps(self._subject(profile), readouts)

    def integrated_gradients(
        self,
        readouts: Sequence[Readout],
        positions: Sequence[Sequence[int]],
        profile: Profile | None = None,
        *,
        steps: int = 64,
        tolerance: float = 0.01,
        checkpointing: bool = False,
    ) -> Iterator[tuple[int, Float[Tensor, " token"], float]]:
        """See `Engine.integrated_gradients`. A routed model's tokens keep their experts."""
        self._check(readouts, [profile])
        subject = self._subject(profile, checkpointing)
        return integrated_gradients(subject, readouts, positions, steps=steps, tolerance=tolerance)

    def weigh_selections(
        self,
        texts: Sequence[Sequence[int]],
        table: Float[np.ndarray, "layer expert"],
        profile: Profile | None = None,
    ) -> list[Float[np.ndarray, " token"]]:
        """See `Engine.weigh_selections`."""
        self._check_routed()
        self._check([Readout(tuple(text), ()) for text in texts], [profile])
        return weigh_selections(self._subject(profile), texts, table)

    def _subject(self, profile: Profile | None, checkpointing: bool = False) -> Subject:
        check_ungated(profile)
        check_whole(self.model, "rationales")
        stream = self._stream_for([profile])
        return Subject(self.model, self.layers, stream, profile, checkpointing)

    def _routed(self, number: int) -> MoELayer:
        self._check_routed()
        found = [layer for layer in self.layers if layer.layer == number]
        if not found:
            raise MoesteerError(
                f"layer {number} of {describe(self.model)} has no experts; those that have are"
                f" {', '.join(str(layer.layer) for layer in self.layers)}."
            )
        return found[0]

    def _stream_for(self, profiles: Sequence[Profile | None]) -> Stream | None:
        """The stream, where a profile has directions in it."""
        return self.stream if any(p is not None and p.directions for p in profiles) else None

    def _check_routed(self) -> None:
        if not self.layers:
            raise MoesteerError(
                f"{describe(self.model)} is a dense model: it has no experts. Directions of the"
                " residual stream can be found and steered in it, experts can't."
            )

    def _check(self, readouts: Sequence[Readout], profiles: Sequence[Profile | None] = ()) -> None:
        """Refuse what can't be read, and profiles of other models."""
        check_readouts(readouts, vocabulary_of(self.model), self.max_tokens)
        for profile in {id(p): p for p in profiles if p is not None}.values():
            check_model(profile, self.facts)

    def _generate_batch(
        self,
        encoded: list[list[int]],
        profiles: list[Profile | None],
        max_new_tokens: int,
        temperature: float,
    ) -> tuple[list[str], list[LayerEvidence | DirectionEvidence]]:
        pad = _pad_id(self.tokenizer)
        longest = max(map(len, encoded))
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in encoded])
        attention = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in encoded])
        # What a model's own generation config may add (penalties, cuts) is left out: nothing that
        # the caller did not ask for decides a reply.
        sampling: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
        sampling |= {"temperature": None, "top_p": None, "top_k": None}
        if temperature > 0:
            sampling |= {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        distinct = {id(profile) for profile in profiles}
        device = input_device(self.model)
        together = profiles[0] if len(distinct) == 1 else profiles
        stream = self._stream_for(profiles)
        with (
            torch.inference_mode(),
            steer(self.model, together or UNSTEERED, self.layers, stream) as fired,
        ):
            output: Any = self.model.generate(  # pyright: ignore[reportCallIssue]
                ids.to(device),
                attention_mask=attention.to(device),
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
                **sampling,
            )
        replies = self.tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
        return replies, fired.evidence()


def load_transformers(
    model: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device_map: str | None = None,
    max_memory: Mapping[Any, str] | None = None,
    offload_folder: str | None = None,
    split: Split | None = None,
    chat_template: str | None = None,
    dense: bool = False,
) -> TransformersEngine:
    """Load a model by its name on the Hub, a folder, or `testbed`.

    `max_memory` says how much of the weights each device may hold at most ("20GiB" of GPU 0, or of
    "cpu"), `offload_folder` where those go that no device has room for. With `split` the model is
    split over the processes that torchrun started, each of which must call this and then the same
    methods.

    It is built from its config without weights first, so that a model that can't be steered is
    refused before anything large is loaded; a dense one too, unless `dense` says that directions
    are enough. A folder may hold an adapter of peft with its tokenizer: its model is loaded and the
    adapter put beside it. Raises MoesteerError where it can't be used.
    """
    folder = path = resolve(model)
    named = revision
    adapter = adapter_base(folder, revision)
    if adapter is not None:
        require_peft()
        path, revision = resolve(adapter.model), adapter.revision
    outline = without_weights(read_config(path, revision))
    if not (dense and is_dense(outline)):
        find_routers(outline)
    tokenizer = read_tokenizer(folder, named, chat_template)
    if split and adapter is not None:
        raise MoesteerError(f"{model} holds an adapter, which can't be split over processes.")
    placed = _placed(device_map, max_memory, offload_folder, split)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, dtype=dtype, **placed
        )
    except Exception as error:
        missing = "`offload_folder`" in str(error)
        more = " On the command line: --offload FOLDER." if missing else ""
        raise MoesteerError(f"{model} can't be loaded: {first_line(error)}{more}") from error
    if adapter is not None:
        load_adapter(loaded, folder)
    try:
        return TransformersEngine(loaded, tokenizer, id=model, revision=revision or commit_of(path))
    except (RuntimeError, ValueError) as error:
        if not split:
            raise
        raise MoesteerError(
            f"{describe(loaded)} does not run split over {processes_of(loaded)} processes; heads"
            f" and experts must share out evenly: {first_line(error)}"
        ) from error


def _placed(
    device_map: str | None,
    max_memory: Mapping[Any, str] | None,
    offload_folder: str | None,
    split: Split | None,
) -> dict[str, Any]:
    """Where the weights go, as `from_pretrained` is told it."""
    limits: dict[str, Any] = {}
    if max_memory:
        limits["max_memory"] = dict(max_memory)
    if offload_folder:
        limits["offload_folder"] = offload_folder
    if not split:
        return {"device_map": device_map or ("auto" if limits else _default_device()), **limits}
    if device_map or limits:
        raise MoesteerError(
            "a split model has one place in each process: give neither a device with it, nor the"
            " most memory, nor a folder to offload to."
        )
    return {"distributed_config": distributed_config(split)}


def _default_device() -> str | None:
    """Spread over the GPUs there are; without one, plain loading, which needs no accelerate."""
    return "auto" if torch.cuda.is_available() else None


def _count(
    layer: MoELayer, slots: Tensor, number: int, counted: Counted, stack: ExitStack
) -> SelectionCounts | ProbabilitySums:
    """Count the layer's routing by slot, of which there are `number`, until the stack closes."""
    if counted == "probability":
        sums = ProbabilitySums(layer, number)
        stack.callback(observe_logits(layer, lambda z: sums.add(z, slots.to(z.device))))
        return sums
    counts = SelectionCounts(layer, number)

    def see(index: Tensor, weights: Tensor) -> None:
        if counted == "top-1":
            first = weights.argmax(-1, keepdim=True)
            index, weights = index.gather(-1, first), weights.gather(-1, first)
        counts.add(index, weights, slots.to(index.device))

    stack.callback(observe(layer, see))
    return counts


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if isinstance(value, int):
            return value
    return 0
