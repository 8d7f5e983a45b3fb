"""lm-eval's RULER tasks: the same examples, answered and scored the same way."""

import pytest
import torch

from ropepp_lit.eval import harness, retrieval
from ropepp_lit.eval.models import load_model

TASKS = ["niah_single_1", "niah_multikey_2", "ruler_fwe", "ruler_cwe"]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_answers_and_scores_are_those_of_lm_eval(small_checkpoints, task):
    process_results = pytest.importorskip("lm_eval.tasks.ruler.common_utils").process_results
    model = load_model(str(small_checkpoints["ec"]), dtype=torch.float32, device=torch.device("cpu"))
    options = {"lengths": [4096], "limit": 2, "seed": 0}
    found = harness.run(model, task, **options)
    samples = found["samples"][task]
    assert len(samples) == 2
    for sample in samples:
        ((prompt, settings),) = (arguments.values() for arguments in sample["arguments"].values())
        ids = [*model.opening, *model.encode(prompt)]
        (written,) = retrieval.write_answers(model, [ids], max_new_tokens=settings["max_gen_toks"])
        (answered,) = sample["filtered_resps"]
        assert written.startswith(answered[:40])
        answers = [str(answer) for answer in sample["doc"]["outputs"]]
        assert retrieval.score(answers, written) == sample["4096"]
        for text in ("", answers[0], f"They are {', '.join(answers)}.", answers[-1].upper()):
            assert retrieval.score(answers, text) == process_results(sample["doc"], [text])["4096"]
    (measured,) = harness.measure(model, task, **options)
    assert (measured.part, measured.metric, measured.length) == (task, "score", 4096)
    assert measured.numerators == [sample["4096"] for sample in samples]
