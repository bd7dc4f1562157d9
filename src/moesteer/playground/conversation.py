"""Two conversations with the same questions: one with the model as it is, one steered."""

from collections.abc import Sequence
from dataclasses import dataclass

from moesteer.chat import render_prompt
from moesteer.contrast import Message
from moesteer.engines.base import Engine
from moesteer.errors import MoesteerError
from moesteer.records import check_text

SIDES = ("unsteered", "steered")


@dataclass(frozen=True)
class Turn:
    """A question, its replies in the order of `SIDES`, and what steered the second."""

    asked: str
    replies: tuple[str, str]
    steering: str


def rendered(
    engine: Engine, turns: Sequence[Turn], asked: str, chat_options: dict, max_new_tokens: int
) -> tuple[list[str], int]:
    """What the model reads on either side, and how many tokens there is room to reply with.

    Either side remembers its own replies. MoesteerError where nothing is asked, or a conversation
    fills the context.
    """
    if not asked.strip():
        raise MoesteerError("there is nothing to ask: write a prompt first.")
    check_text(asked, "the prompt")
    prompts = []
    for side in range(len(SIDES)):
        before = [
            Message(role, text)
            for turn in turns
            for role, text in (("user", turn.asked), ("assistant", turn.replies[side]))
        ]
        messages = [*before, Message("user", asked)]
        prompts.append(render_prompt(messages, engine.tokenizer, chat_options))
    if engine.max_tokens is None:
        return prompts, max_new_tokens
    used = max(
        len(engine.tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts
    )
    if used >= engine.max_tokens:
        raise MoesteerError(
            f"the conversation has {used} tokens, which fills the model's context of"
            f" {engine.max_tokens}. Begin a new one."
        )
    return prompts, min(max_new_tokens, engine.max_tokens - used)
