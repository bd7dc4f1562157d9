"""A steered model as a model of lm-evaluation-harness.

    python -m moesteer.harnesses.lm_eval --model moesteer \\
        --model_args pretrained=MODEL,profile=FILE --tasks … --output_path …

is the command `lm_eval` with one model more; its own knows only the models of its list. In Python
the import alone makes it known: `lm_eval.simple_evaluate(model="moesteer", …)`.

It is lm-eval's own model of transformers, HFLM, whose calls of the model run under the profile.
Without a profile nothing is changed. What the steering did is counted at every call and told in
the results' `config`; a call in which it did not do what it promises raises DidNotFire.
"""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from typing import Any

from lm_eval.api.model import CacheHook
from lm_eval.api.registry import model_registry
from lm_eval.models import huggingface

from moesteer.chat import parse_chat_options
from moesteer.engines.checkpoint import commit_of, resolve
from moesteer.engines.evidence import DirectionEvidence, LayerEvidence, summed
from moesteer.engines.readouts import reaching
from moesteer.engines.transformers.splitting import check_whole
from moesteer.engines.transformers.steering import steer
from moesteer.engines.transformers_engine import TransformersEngine
from moesteer.errors import DidNotFire, MoesteerError
from moesteer.generate import check_steers
from moesteer.profile import Profile
from moesteer.profile_fit import check_model, check_ungated
from moesteer.report.terminal import evidence_lines

CACHE_OWNER = "moesteer"
"""The key of lm-eval's cache of replies under which it says whose replies it holds."""

HFLM: Any = huggingface.HFLM  # a decorator hides its type

log = logging.getLogger("lm_eval.moesteer")


# By name, so that it does not matter how often this module is run.
model_registry.register("moesteer", target="moesteer.harnesses.lm_eval:SteeredLM")


class SteeredLM(HFLM):
    """HFLM under a profile.

    `pretrained` is a name on the Hub, a folder, or a bundled model, or an engine whose model is
    loaded already; `profile` a file, or a profile. `chat_option` is KEY=VALUE for the chat
    template, or several joined by ";"; otherwise the profile's own hold. All else goes to HFLM. Its
    bars of progress are left out where `quiet` is set.
    """

    def __init__(
        self,
        pretrained: str | TransformersEngine,
        profile: str | Profile | None = None,
        chat_option: str | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        device: str | None = "cuda:0",  # as lm-eval's command: where there is none, the CPU
        **options: Any,
    ) -> None:
        if options.get("peft"):
            raise MoesteerError("the model moesteer loads no peft=…; merge the adapter first.")
        loaded = Profile.load(profile) if isinstance(profile, str) else profile
        given = parse_chat_options(chat_option.split(";") if chat_option else [])
        options["chat_template_args"] = {
            **(loaded.chat_options if loaded else {}),
            **(chat_template_args or {}),
            **given,
        }
        self.quiet = False
        self._profile: Profile | None = None
        self._fired: list[LayerEvidence | DirectionEvidence] = []
        self._prompt: int | None = None
        self._goes_on = True
        self._called = False
        if isinstance(pretrained, str):
            path, revision = resolve(pretrained), options.get("revision")
            super().__init__(pretrained=path, device=device, **options)
            self.engine = TransformersEngine(
                self.model,
                self.tokenizer,
                id=pretrained,
                revision=revision or commit_of(path, revision),
            )
        else:
            self.engine = pretrained
            with _without_warnings():
                super().__init__(
                    pretrained=self.engine.model, tokenizer=self.engine.tokenizer, **options
                )
        check_whole(self.engine.model, "lm-eval's calls")
        self.steer_by(loaded)

    def steer_by(self, profile: Profile | None) -> None:
        """Steer by another profile from now on, None by none; the evidence starts anew.

        Raises MoesteerError where it doesn't fit the model, steers nothing, or has a gate.
        """
        if profile is not None:
            check_runs(profile)
            check_model(profile, self.engine.facts)
        self._profile = profile
        self._fired = []
        self._called = False

    @property
    def evidence(self) -> list[LayerEvidence | DirectionEvidence]:
        """What the profile did in all calls since it was put in place; tokens of padding count."""
        return self._fired

    # -- around HFLM's calls of the model --------------------------------------------------------

    @contextmanager
    def _steered(self, rows: int) -> Iterator[None]:
        """The model under the profile, for a batch of so many rows; what it did is kept."""
        self._called = True
        if self._profile is None:
            yield
            return
        profile, prompts = self._profile, None
        if self._prompt is not None:
            prompts = [self._prompt] * rows
            profile = reaching(profile, self._goes_on)
            if not profile.steers:
                yield
                return
        stream = self.engine.stream if profile.directions else None
        with steer(self.engine.model, profile, self.engine.layers, stream, prompts) as fired:
            yield
        self._fired = summed([*self._fired, *fired.evidence()])

    def _model_call(self, inps, attn_mask=None, labels=None):
        with self._steered(len(inps)):
            return super()._model_call(inps, attn_mask, labels)

    def _model_generate(self, context, max_length, stop, **generation_kwargs):
        with self._steered(len(context)):
            return super()._model_generate(context, max_length, stop, **generation_kwargs)

    def _detect_batch_size(self, requests=None, pos=0):
        # What is tried out on ones is no evidence of anything.
        profile, self._profile = self._profile, None
        try:
            return super()._detect_batch_size(requests, pos)
        finally:
            self._profile = profile

    def loglikelihood(self, requests, disable_tqdm=False):
        return super().loglikelihood(requests, disable_tqdm or self.quiet)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        return super().loglikelihood_rolling(requests, disable_tqdm or self.quiet)

    def generate_until(self, requests, disable_tqdm=False):
        return super().generate_until(requests, disable_tqdm or self.quiet)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        """As HFLM's. Where a direction is for the prompt only, or for what follows it, texts of
        one length whose prompts end at one place share a batch: each row of HFLM's batch holds
        prompt and continuation, and does not say where one ends."""
        disable_tqdm = disable_tqdm or self.quiet
        if not (self._profile and any(d.window != "all" for d in self._profile.directions)):
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        alike: dict[tuple[int, int], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            length = min(len(context) + len(continuation) - 1, self.max_length)
            alike.setdefault((length, len(continuation)), []).append(number)
        found: dict[int, tuple[float, bool]] = {}
        for (length, scored), numbers in alike.items():
            self._prompt, self._goes_on = length - scored + 1, scored > 1
            try:
                answers = super()._loglikelihood_tokens(
                    [requests[number] for number in numbers], True, override_bs and len(numbers)
                )
            finally:
                self._prompt = None
            found.update(zip(numbers, answers, strict=True))
        return [found[number] for number in range(len(requests))]

    # -- what lm-eval keeps ----------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        """Names lm-eval's cache of rendered prompts, which chat options change too."""
        name = super().tokenizer_name
        if not self.chat_template_args:
            return name
        options = repr(sorted(self.chat_template_args.items())).encode()
        return f"{name}__{sha256(options).hexdigest()[:16]}"

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Refuse a cache of replies (`use_cache`) of another profile or model.

        lm-eval looks replies up by their request alone.
        """
        kept = cache_hook.dbdict
        if kept is not None:
            owner = f"{self.engine.facts.id} {self.engine.facts.config_hash} " + (
                "unsteered" if self._profile is None else f"profile {self._profile.fingerprint}"
            )
            there = kept.get(CACHE_OWNER, None if len(kept) else owner)
            if there != owner:
                raise MoesteerError(
                    f"use_cache names replies of {there or 'another model'}, and these are to be of"
                    f" {owner}: lm-eval would mix them up. Give each its own file."
                )
            kept[CACHE_OWNER] = owner
        super().set_cache_hook(cache_hook)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results' `config`: with the profile, and what it did."""
        told = self.told()
        if self._profile is not None:
            for line in evidence_lines(self._fired) or ["not fired: all replies are of the cache"]:
                log.info(line)
        return {**super().get_model_info(), "moesteer": told}

    def told(self) -> dict[str, Any]:
        """The model, the profile and the evidence that it fired, as JSON.

        Raises DidNotFire where the model was called and nothing of it was steered.
        """
        profile = self._profile
        if profile is None:
            return {"model": self.engine.facts.id, "profile": None}
        if self._called and not self._fired:
            raise DidNotFire(
                f"{profile.name} did not fire: its directions are for generated tokens, and these"
                " tasks have none that the model reads."
            )
        return {
            "model": self.engine.facts.id,
            "profile": profile.name,
            "fingerprint": profile.fingerprint,
            "fired": [asdict(seen) | {"obeyed": seen.obeyed} for seen in self._fired],
        }


def check_runs(profile: Profile) -> None:
    """MoesteerError for a profile that would steer nothing, and for one with a gate."""
    check_steers(profile)
    check_ungated(profile, "lm-eval")


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Without what HFLM says of any model that is loaded already."""
    logger = logging.getLogger(HFLM.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def main() -> None:
    """The command `lm_eval`, with this model among its models; exits with 2 for MoesteerError."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except MoesteerError as error:
        print(f"moesteer: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
