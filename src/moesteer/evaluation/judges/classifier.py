"""A trained classifier of texts: the likeliest label of a sequence-classification model.

Intuition. Small classifiers of toxicity, refusal or entailment are cheap and repeatable, and know
nothing outside what they were trained on. The card says which label means which outcome; a label
it leaves out is no outcome. The score is the label's probability. A text longer than the model
takes is cut at its end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from moesteer.errors import MoesteerError
from moesteer.evaluation.judges.base import Context, Settings
from moesteer.evaluation.judges.models import load_judge, short_batches
from moesteer.evaluation.task import Item, Judge, Verdict
from moesteer.records import Text


class Classifier(Settings):
    """`labels` maps the model's labels to outcomes; it reads the reply, or prompt and reply."""

    model: Text
    labels: Annotated[dict[str, Text], Field(min_length=1)]
    revision: Text | None = None
    reads: Literal["reply", "prompt and reply"] = "reply"
    batch_size: Annotated[int, Field(ge=1)] = 8

    @property
    def outcomes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.labels.values()))

    def judge(self, context: Context) -> Judge:
        model, tokenizer = load_judge(
            "AutoModelForSequenceClassification", self.model, self.revision
        )
        known = list(model.config.id2label.values())
        if unknown := [label for label in self.labels if label not in known]:
            raise MoesteerError(
                f"the judge {self.model} has no label {unknown[0]!r}; it has {', '.join(known)}."
            )
        return _Classifier(self, model, tokenizer, f"classifier {self.model}")


@dataclass(frozen=True)
class _Classifier:
    settings: Classifier
    model: Any
    tokenizer: Any
    name: str

    @property
    def outcomes(self) -> tuple[str, ...]:
        return self.settings.outcomes

    def __call__(self, items: Sequence[Item], replies: Sequence[str]) -> list[Verdict]:
        both = self.settings.reads == "prompt and reply"
        texts = [
            (item.prompt, reply) if both else (reply,)
            for item, reply in zip(items, replies, strict=True)
        ]
        return short_batches(texts, self.settings.batch_size, self._read)

    def _read(self, texts: list[tuple[str, ...]]) -> list[Verdict]:
        import torch

        batch = self.tokenizer(
            *map(list, zip(*texts, strict=True)), return_tensors="pt", padding=True, truncation=True
        ).to(self.model.device)
        with torch.inference_mode():
            shares = self.model(**batch).logits.float().softmax(-1)
        return [self._verdict(row) for row in shares.tolist()]

    def _verdict(self, shares: list[float]) -> Verdict:
        best = max(range(len(shares)), key=shares.__getitem__)
        label = self.model.config.id2label[best]
        return Verdict(
            self.name, self.settings.labels.get(label), f"{label} {shares[best]:.2f}", shares[best]
        )
