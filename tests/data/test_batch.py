import pytest
import torch

from ropepp_lit.data.batch import Batch
from ropepp_lit.nn import Documents
from ropepp_lit.nn.context_parallel import ContextShard

EOS = 1
INPUT_IDS = torch.tensor([[5, 1, 7, 7, 7, 1], [7] * 6])


@pytest.mark.parametrize("packed", [True, False])
def test_visible_pairs_match_the_attention_mask(packed):
    starts = torch.tensor([[1, 0, 1, 0, 0, 0], [0] * 6]).bool()
    documents = Documents.from_starts(starts) if packed else None
    ids = documents.ids if packed else torch.zeros_like(INPUT_IDS)
    batch = Batch.create(INPUT_IDS, INPUT_IDS, documents)
    assert batch.visible_pairs == (ids[:, :, None] == ids[:, None]).tril().sum()
    assert batch.num_tokens == 12


@pytest.mark.parametrize("shard", [None, ContextShard(2, 0, "heads"), ContextShard(3, 1, "gather")])
def test_places_are_the_positions_of_this_ranks_labels(shard):
    labels = INPUT_IDS.masked_fill(INPUT_IDS == EOS, -100)
    batch = Batch.create(INPUT_IDS, labels, None, shard=shard)
    expected = (batch.labels.flatten() != -100).nonzero().flatten()
    assert batch.num_labels == len(expected)
    if batch.places is not None:
        assert torch.equal(batch.places, expected)
    assert (batch.places is None) == (len(expected) == batch.labels.numel())
    assert batch.input_ids.shape == batch.labels.shape
    assert batch.num_tokens == 12  # of full rows


def test_places_are_none_if_no_label_is_ignored():
    assert Batch.create(INPUT_IDS, INPUT_IDS, None).places is None
