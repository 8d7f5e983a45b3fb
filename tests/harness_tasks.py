"""Local tasks for lm-eval with their data: one for each type of request and aggregation."""

from __future__ import annotations

import json
from pathlib import Path

DOCUMENTS = [
    {
        "question": f"What comes after {number}?",
        "choices": [str(number + 1), str(number + 10), f"perhaps {number}"],
        "gold": number % 3,
        "text": f"Count: {', '.join(str(n) for n in range(number, number + 5 + number % 4))}, and so on.",
        "answer": f"{number + 1}",
    }
    for number in range(12)
]

COMMON = """
dataset_path: json
dataset_kwargs: {{cache_dir: {cache}, data_files: {{test: {data}, train: {train}}}}}
test_split: test
metadata: {{version: 3}}
"""

# lm-eval 0.4.13's `hf` scores the wrong tokens where two requests read the same tokens and have continuations of
# different lengths, so no two tasks here have that.
TASKS = {
    "local_choice": """
task: local_choice
output_type: multiple_choice
fewshot_split: train
num_fewshot: 2
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: brier_score, higher_is_better: false}, {metric: mcc}]
""",
    "local_rolling": """
task: local_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "local_lambada": """
task: local_lambada
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' ' + text.split(' ')[-1]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "local_no_context": """
task: local_no_context
output_type: loglikelihood
doc_to_text: ""
target_delimiter: ""
doc_to_target: "{{text}} Again."
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "local_filters": """
task: local_filters
output_type: generate_until
doc_to_text: "{{text}} Then"
doc_to_target: "[invalid]"
generation_kwargs: {until: ["e", "\\n\\n"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
filter_list:
  - {name: strict-match, filter: [{function: regex, regex_pattern: "#### (\\\\d+)"}, {function: take_first}]}
  - {name: flexible-extract, filter: [{function: regex, regex_pattern: "^([\\\\s\\\\S]?)"}, {function: take_first}]}
""",
    "local_wer": """
task: local_wer
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: answer
generation_kwargs: {until: [], max_gen_toks: 8}
process_results: !function functions.edits
metric_list: [{metric: wer, aggregation: !function functions.rate, higher_is_better: false}]
""",
    "local_sampled": """
task: local_sampled
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: answer
generation_kwargs: {max_gen_toks: 8, num_beams: 4}
metric_list: [{metric: exact_match}]
""",
    "local_needles": """
task: local_needles
dataset_path: ""
output_type: generate_until
test_split: test
custom_dataset: !function functions.needles
doc_to_text: "{{input}}"
doc_to_target: "{{outputs}}"
process_results: !function functions.score
generation_kwargs: {until: [], max_gen_toks: 4}
metric_list:
  - {metric: "4096", aggregation: !function functions.of_length, higher_is_better: true}
  - {metric: "8192", aggregation: !function functions.of_length, higher_is_better: true}
metadata: {version: 1}
""",
    "local_group": """
group: local_group
task: [local_lambada, local_no_context]
aggregate_metric_list: [{metric: acc, weight_by_size: false}]
metadata: {version: 1}
""",
}

FUNCTIONS = '''
import itertools

import datasets


def needles(max_seq_lengths, tokenizer, **kwargs):
    """As RULER's tasks: examples of one length after those of another."""
    per_length = [
        [{"input": f"Example {k} of {n}", "outputs": ["x"], "max_length": n} for k in range(6)] for n in max_seq_lengths
    ]
    return {"test": datasets.Dataset.from_list(list(itertools.chain(*per_length)))}


def score(doc, results):
    return {"4096": -1.0, "8192": -1.0} | {str(doc["max_length"]): float(doc["max_length"] % 7)}


def of_length(items):
    found = [item for item in items if item != -1]
    return sum(found) / len(found) if found else -1


def edits(doc, results):
    wanted, written = doc["text"].split(), results[0].split()
    wrong = sum(a != b for a, b in zip(wanted, written)) + abs(len(wanted) - len(written))
    return {"wer": (wrong, len(wanted))}


def rate(items):
    return sum(wrong for wrong, _ in items) / sum(words for _, words in items)
'''


def write_tasks(folder: Path) -> Path:
    """Write the tasks and their data into a new folder.

    Returns:
        The folder, for lm-eval's include_path.
    """
    folder.mkdir(parents=True)
    for name, documents in (("test", DOCUMENTS[:8]), ("train", DOCUMENTS[8:])):
        lines = "".join(json.dumps(document) + "\n" for document in documents)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    common = COMMON.format(cache=folder / "cache", data=folder / "test.jsonl", train=folder / "train.jsonl")
    for name, task in TASKS.items():
        text = task if name in ("local_group", "local_needles") else task + common
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    (folder / "functions.py").write_text(FUNCTIONS, encoding="utf-8")
    return folder
