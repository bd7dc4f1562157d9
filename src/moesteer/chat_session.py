"""`moesteer chat`: a conversation whose steering is switched while it goes on."""

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moesteer.chat import render_prompt
from moesteer.contrast import Message
from moesteer.errors import MoesteerError
from moesteer.generate import check_limits, check_steers, merged_options
from moesteer.profile import Profile
from moesteer.profile_fit import check_model
from moesteer.records import check_text
from moesteer.report.terminal import evidence_lines, gate_lines

if TYPE_CHECKING:
    from moesteer.engines.base import Engine

HELP = """\
  /on, /off      steer by the profile, or leave the model alone
  /with FILE     load another profile and steer by it
  /retry         ask the last question again, as steered now
  /new           forget the conversation
  /help, /quit"""


@dataclass
class ChatSession:
    """The state of a conversation; `reply` and the commands change it, nothing is printed here."""

    engine: "Engine"
    profile: Profile | None
    system: str | None
    options: list[str]
    max_new_tokens: int
    temperature: float
    steering: bool = True
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_limits(self.max_new_tokens, self.temperature)
        merged_options(self.profile, self.options)  # said now rather than at each question
        if self.profile is not None:
            check_model(self.profile, self.engine.facts)
            check_steers(self.profile)

    @property
    def status(self) -> str:
        if self.profile is None:
            return "unsteered"
        return f"{self.profile.name} {'on' if self.steering else 'off'}"

    def reply(self, text: str) -> tuple[str, list[str]]:
        """The model's answer, and what proves that it was steered."""
        applied = self.profile if self.steering else None
        opening = [] if self.system is None else [Message("system", self.system)]
        asked = [*opening, *self.messages, Message("user", text)]
        check_text(text, "your line")
        options = merged_options(self.profile, self.options)
        prompt = render_prompt(asked, self.engine.tokenizer, options)
        generated = self.engine.generate(
            [prompt],
            applied,
            max_new_tokens=min(self.max_new_tokens, self._room(prompt)),
            temperature=self.temperature,
        )
        answer = generated.replies[0]
        self.messages += [Message("user", text), Message("assistant", answer)]
        return answer, [*evidence_lines(generated.evidence), *gate_lines(generated.steered)]

    def _room(self, prompt: str) -> int:
        """Tokens that the context leaves for a reply; MoesteerError where it is full."""
        if self.engine.max_tokens is None:
            return self.max_new_tokens
        used = len(self.engine.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        if used >= self.engine.max_tokens:
            raise MoesteerError(
                f"the conversation has {used} tokens, which fills the model's context of"
                f" {self.engine.max_tokens}. Begin anew with /new."
            )
        return self.engine.max_tokens - used

    def command(self, line: str) -> tuple[str, list[str]]:
        """Do what a line that begins with / says; what to tell the user."""
        name, _, argument = line.partition(" ")
        match name:
            case "/on" | "/off":
                if self.profile is None:
                    raise MoesteerError("there is no profile to switch; load one: /with FILE")
                self.steering = name == "/on"
            case "/with":
                if not argument.strip():
                    raise MoesteerError("which profile? /with FILE")
                loaded = Profile.load(argument.strip())
                check_model(loaded, self.engine.facts)
                check_steers(loaded)
                self.profile, self.steering = loaded, True
            case "/new":
                self.messages.clear()
                return "forgotten", []
            case "/retry":
                if not self.messages:
                    raise MoesteerError("there is no question to repeat yet.")
                before, question = self.messages, self.messages[-2].content
                self.messages = before[:-2]
                try:
                    return self.reply(question)
                except MoesteerError:
                    self.messages = before
                    raise
            case "/help":
                return HELP, []
            case _:
                raise MoesteerError(f"unknown command {name}\n{HELP}")
        return self.status, []


def talk(session: ChatSession) -> None:
    """Read lines until /quit or the end of input; mistakes are said, the conversation goes on."""
    if sys.stdin is None:
        return
    interactive = sys.stdin.isatty()
    if interactive:
        print(HELP)
    while True:
        try:
            line = input(f"[{session.status}] > " if interactive else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise MoesteerError(f"standard input is not UTF-8: {error}.") from None
        if line == "/quit":
            return
        if not line:
            continue
        try:
            answer, proof = session.command(line) if line[0] == "/" else session.reply(line)
        except MoesteerError as error:
            print(f"moesteer: {error}", file=sys.stderr)
            continue
        print(answer)
        for proved in proof:
            print(f"  ({proved})", file=sys.stderr)
