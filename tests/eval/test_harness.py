"""lm-eval's RULER tasks: the same examples, answered and scored the same way."""

import pytest
import torch

from ropepp_lit.eval import harness, retrieval
from ropepp_lit.eval.models import load_model

# Bytes are many: a list of common words needs more of them.
TASKS = [("niah_single_1", 4096), ("niah_multikey_2", 4096), ("ruler_fwe", 4096), ("ruler_cwe", 16384)]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "length"), TASKS)
def test_answers_and_scores_are_those_of_lm_eval(small_checkpoints, task, length):
    process_results = pytest.importorskip("lm_eval.tasks.ruler.common_utils").process_results
    model = load_model(str(small_checkpoints["ec"]), dtype=torch.float32, device=torch.device("cpu"))
    options = {"lengths": [length], "limit": 2, "seed": 0}
    found = harness.run(model, task, **options)
    samples = found["samples"][task]
    assert len(samples) == 2
    for sample in samples:
        ((prompt, settings),) = sample["arguments"]
        ids = [*model.opening, *model.encode(prompt)]
        (written,) = retrieval.write_answers(model, [ids], max_new_tokens=settings["max_gen_toks"])
        (answered,) = sample["filtered_resps"]
        assert written.startswith(answered[:40])
        answers = [str(answer) for answer in sample["doc"]["outputs"]]
        assert retrieval.score(answers, written) == sample[str(length)]
        for text in ("", answers[0], f"They are {', '.join(answers)}.", answers[-1].upper()):
            assert retrieval.score(answers, text) == process_results(sample["doc"], [text])[str(length)]
    (measured,) = harness.measure(model, task, **options)
    assert (measured.part, measured.metric, measured.length) == (task, "score", length)
    assert measured.numerators == [sample[str(length)] for sample in samples]
