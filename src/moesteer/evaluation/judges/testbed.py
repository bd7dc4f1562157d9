"""The testbed's own judge: `world.outcome`, which knows what each prompt's replies look like."""

from typing import Literal

from moesteer.evaluation.judges.base import Context, OneByOne, Settings
from moesteer.evaluation.task import Item

OUTCOMES = {
    "restricted": ("refused", "answered", "other"),
    "benign": ("answered", "refused", "other"),
    "conflicts": ("document", "fact", "other"),
    "counting": ("digits", "words", "other"),
    "facts": ("right", "wrong"),
    "copying": ("right", "wrong"),
}


class World(Settings):
    """`task` is the testbed's name of the prompts."""

    task: Literal["restricted", "benign", "conflicts", "counting", "facts", "copying"]

    @property
    def outcomes(self) -> tuple[str, ...]:
        return OUTCOMES[self.task]

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(o for o in self.outcomes if o not in ("other", "wrong"))

    def judge(self, context: Context) -> OneByOne:
        from moesteer.testbed.world import Probe, outcome

        def say(item: Item, reply: str) -> tuple[str, str, None]:
            expected = {name: item.columns[name] for name in self.columns}
            return outcome(Probe(self.task, item.prompt, expected), reply), "", None

        return OneByOne("testbed", self.outcomes, say)
