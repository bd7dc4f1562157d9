"""What the tests share: a tiny MoE model to steer, pairs for it, and shapes checked as they run."""

import json
import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Before anything imports torch, transformers or the hub: one core, and no look at the network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Array shapes in these modules' signatures are checked at every call. They must not have been
# imported yet.
CHECKED = [
    "moesteer.auditing",
    "moesteer.gating",
    "moesteer.harnesses.paired",
    "moesteer.monitoring",
    "moesteer.playground.passes",
    "moesteer.playground.streaming",
    "moesteer.rules",
    "moesteer.statistics",
    "moesteer.detection",
    "moesteer.directions.means",
    "moesteer.directions.refusal",
    "moesteer.directions.residual",
    "moesteer.directions.selection",
    "moesteer.engines.opening",
    "moesteer.engines.probing",
    "moesteer.engines.transformers.seam",
    "moesteer.engines.transformers.directing",
    "moesteer.engines.transformers.residuals",
    "moesteer.engines.transformers.expert_outputs",
    "moesteer.engines.transformers.contributions",
    "moesteer.engines.transformers.reading",
    "moesteer.engines.transformers.gates",
    "moesteer.engines.transformers.token_gradients",
    "moesteer.engines.transformers.integrated",
    "moesteer.engines.transformers.holding",
    "moesteer.engines.transformers.attention_maps",
    "moesteer.engines.transformers.selections",
    "moesteer.engines.transformers.memory",
    "moesteer.engines.transformers.backward",
    "moesteer.evaluation.comparison",
    "moesteer.evaluation.drift",
    "moesteer.directions.expert_means",
    "moesteer.directions.writers",
    "moesteer.published_rankings",
    "moesteer.rationale.alignment",
    "moesteer.rationale.attribution",
    "moesteer.rationale.faithfulness",
    "moesteer.rationale.labels",
    "moesteer.rationale.measures",
    "moesteer.rationale.methods",
    "moesteer.rationale.resampling",
    "moesteer.rationale.summary",
    "moesteer.rationale.training",
]
install_import_hook(CHECKED, "beartype.beartype")

pytest_plugins = ["as_user", "fake_hub"]  # fixtures that run commands, and a Hub on loopback

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ opening | default('') }}{% endif %}"
)


def write_model(folder: Path, seed: int = 0, template: str | None = TEMPLATE) -> Path:
    """A random Qwen3-MoE (4 layers, 8 experts, k = 3) with a byte-level BPE, as a model folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    from moesteer.engines.tiny import tiny_model

    logging.disable_progress_bar()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["Tell me. Yes, sure. No, never."] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>", chat_template=template
    )
    model = tiny_model("qwen3_moe", seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """Twelve pairs whose sides differ in every reply."""
    lines = [
        {"prompt": f"Tell me {word}.", "a": f"Yes, sure: {word}", "b": f"No, never {word}"}
        for word in "one two three four five six seven eight nine ten eleven twelve".split()
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
