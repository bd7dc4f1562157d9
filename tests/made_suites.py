"""Tasks of lm-evaluation-harness over the testbed's prompts, as YAML and JSON lines in a folder."""

import json
from pathlib import Path

from moesteer.testbed.world import contrast_pairs

TEMPLATE = """\
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
{asked}
metadata: {{version: 1}}
"""

CHOICE = """\
doc_to_text: "{{prompt}}"
doc_to_choice: "{{[a, b]}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}]"""

SPOKEN = """\
doc_to_text: "{{prompt}}"
doc_to_target: "{{a}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]"""

ROLLING = """\
doc_to_text: ""
doc_to_target: "{{prompt}}"
metric_list: [{metric: word_perplexity}]"""

TASKS = {
    "choice": ("multiple_choice", CHOICE),
    "spoken": ("generate_until", SPOKEN),
    "rolling": ("loglikelihood_rolling", ROLLING),
}

FOLLOWING = ((1, 9), (1, 11), (2, 9))
"""Planted in the testbed: activated, it follows the document (side A); deactivated, it does not."""


def documents(count: int) -> list[dict[str, str]]:
    """Pairs of a reply that follows the document (a) and one that gives the fact (b); half of
    either habit, in turns."""
    return contrast_pairs("document", "test")[:count]


def write_suite(folder: Path, count: int = 12) -> Path:
    """The tasks choice, spoken and rolling over as many documents, and a group of the first two."""
    folder.mkdir(exist_ok=True)
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in documents(count)))
    for task, (kind, asked) in TASKS.items():
        text = TEMPLATE.format(task=task, data=data, kind=kind, asked=asked)
        (folder / f"{task}.yaml").write_text(text)
    return folder
