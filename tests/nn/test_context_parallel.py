"""Context parallelism: two and four gloo processes against one in float64, and the number of bytes exchanged."""

import multiprocessing
from datetime import timedelta
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from plain_schemes import ALL_SCHEMES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from ropepp_lit.errors import UsageError
from ropepp_lit.nn import (
    Decoder,
    DecoderConfig,
    Documents,
    Frequencies,
    Probe,
    RoPE,
)
from ropepp_lit.nn.attention import Attention
from ropepp_lit.nn.context_parallel import (
    MODES,
    ContextGroup,
    choose_mode,
    elements_moved,
    tokens_of_rank,
)
from ropepp_lit.nn.kernels import Segments, attend, attend_packed

ROWS, TOKENS = 2, 48
GEOMETRY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2,
}  # fmt: skip


def make(scheme, **changes):
    torch.manual_seed(0)
    return Decoder(DecoderConfig(**{**GEOMETRY, **changes}), scheme, Frequencies()).double()


def batch(*, packed):
    torch.manual_seed(1)
    input_ids, labels = torch.randint(0, 64, (2, ROWS, TOKENS))
    documents = None
    if packed:  # one that spans the chunks of all ranks, ones of a single token, ones that end where a chunk does
        starts = torch.zeros(ROWS, TOKENS, dtype=torch.int64)
        starts[0, [5, 6, 12, 30, 46]] = 1
        starts[1, [1, 46]] = 1
        documents = Documents.from_ids(starts.cumsum(1))
    return input_ids, labels, documents


def run(decoder, input_ids, labels, **arguments):
    """Return logits, loss and gradients."""
    decoder.zero_grad()
    logits = decoder(input_ids, **arguments)
    loss = decoder.loss(input_ids, labels, reduction="sum", **arguments)
    loss.backward()
    return logits.detach(), loss.detach(), [parameter.grad for parameter in decoder.parameters()]


CASES = [
    *((name, {}, mode, packed) for name, mode, packed in product(ALL_SCHEMES, MODES, (False, True))),
    ("ec", {"qk_norm": True, "attention_bias": True}, "gather", True),
    *(("ec", {"attention_gate": "element", "score_scaling": "log"}, mode, True) for mode in MODES),
    ("rope", {"num_attention_heads": 3, "num_key_value_heads": 1}, "gather", True),  # heads that no rank can have alone
    ("rope", {"num_attention_heads": 3, "num_key_value_heads": 1}, "gather", False),
]


def compare(rank, ranks, port):
    """Compute every case with all ranks and with one (target of each process)."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, store=store, timeout=timedelta(seconds=60))
    for name, changes, mode, packed in CASES:
        decoder, (input_ids, labels, documents) = make(ALL_SCHEMES[name], **changes), batch(packed=packed)
        expected_logits, expected_loss, expected_gradients = run(decoder, input_ids, labels, documents=documents)
        group = ContextGroup(dist.group.WORLD, mode)
        decoder.set_context_group(group)
        mine, mine_labels = group.shard.take(input_ids), group.shard.take(labels)
        logits, loss, gradients = run(decoder, mine, mine_labels, documents=documents)
        for total in (loss, *gradients):
            dist.all_reduce(total)
        compared = {"logits": (logits, group.shard.take(expected_logits)), "loss": (loss, expected_loss)}
        for (parameter, _), pair in zip(
            decoder.named_parameters(), zip(gradients, expected_gradients, strict=True), strict=True
        ):
            compared[parameter] = pair
        # Positions that are given, documents that are sharded before, and what ignores or undoes the sharing.
        sharded = group.shard.take_documents(documents, ROWS, TOKENS)
        positions = torch.arange(TOKENS).expand(ROWS, -1) if documents is None else documents.positions
        with torch.no_grad():
            compared["given positions"] = decoder(mine, documents=sharded, positions=positions), logits
            cache = decoder.allocate_cache(batch_size=ROWS, max_tokens=TOKENS)
            compared["with a cache"] = decoder(input_ids, documents=documents, cache=cache), expected_logits
            decoder.set_context_group(None)
            compared["undone"] = decoder(input_ids, documents=documents), expected_logits
        for what, (actual, reference) in compared.items():
            where = f"{name} {changes}, {mode}, packed {packed}, {what}"
            torch.testing.assert_close(actual, reference, atol=1e-9, rtol=0, msg=where)
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_compute_the_result_of_one_process(ranks):
    multiprocessing.set_forkserver_preload(["ropepp_lit.nn", "pytest"])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.start_processes(compare, args=(ranks, store.port), nprocs=ranks, start_method="forkserver")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (5, 9), (9, 9), (40, 100)])
def test_causal_attention_with_more_keys_than_queries(queries, keys, dtype):
    torch.manual_seed(0)
    q = torch.randn(2, queries, 4, 16, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(2, keys, 2, 16, dtype=dtype, requires_grad=True) for _ in range(2))
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    scores = torch.einsum("bthd,bshd->bhts", q.double(), k.double().repeat_interleave(2, 2)) / 4
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    expected = torch.einsum("bhts,bshd->bthd", weights, v.double().repeat_interleave(2, 2))
    gradient = torch.randn_like(expected)
    bounds = (torch.arange(3, dtype=torch.int32) * length for length in (queries, keys))
    packed = attend_packed(*(x.flatten(0, 1) for x in (q, k, v)), Segments(*bounds, queries, keys)).view_as(q)
    tolerance = 1e-12 if dtype == torch.float64 else 5e-2
    for actual in (attend(q, k, v), packed):
        torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=0)
        pairs = zip(
            torch.autograd.grad(actual, (q, k, v), gradient.to(dtype)),
            torch.autograd.grad(expected, (q, k, v), gradient, retain_graph=True),
            strict=True,
        )
        for one, other in pairs:
            torch.testing.assert_close(one, other, atol=tolerance, rtol=0)


class Largest(TorchDispatchMode):
    """Record the storage size of the largest tensor that an operation returns, in bytes."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return result


def test_more_keys_than_queries_need_no_mask_in_memory():
    q, k, v = (torch.randn(1, tokens, 1, 8, requires_grad=True) for tokens in (500, 1000, 1000))
    with Largest() as largest:
        attend(q, k, v).sum().backward()
    assert largest.nbytes <= 1000 * 8 * 4


@pytest.mark.parametrize(
    ("scheme", "ranks", "mode"),
    [  # heads 4 to 1, as in Llama 3
        ("rope", 2, "gather"), ("rope", 4, "gather"), ("rope", 5, "gather"), ("rope", 8, "heads"),
        ("ec", 2, "gather"), ("ec", 4, "gather"), ("ec", 7, "gather"), ("ec", 8, "heads"), ("ec", 64, "gather"),
        ("eh", 2, "gather"), ("eh", 4, "gather"), ("eh", 8, "gather"), ("eh", 16, "heads"), ("eh", 32, "gather"),
    ],
)  # fmt: skip
def test_default_mode_has_less_communication(scheme, ranks, mode):
    layout = ALL_SCHEMES[scheme].head_layout(num_attention_heads=32, num_key_value_heads=8, head_dim=128)
    assert choose_mode(layout, 128, ranks) == mode
    assert choose_mode(layout, 128, ranks, "gather") == "gather"


def test_mistakes_are_one_line():
    layout = RoPE().head_layout(num_attention_heads=8, num_key_value_heads=2, head_dim=16)
    with pytest.raises(UsageError, match="context_parallel_mode: no mode 'ring'; choose heads or gather"):
        choose_mode(layout, 16, 2, "ring")
    with pytest.raises(
        UsageError, match=r"context_parallel_mode: heads needs .* divides the 8 query heads computed at once; 3 does"
    ):
        choose_mode(layout, 16, 3, "heads")
    with pytest.raises(UsageError, match="context_parallel_size: 3 ranks cannot split rows of 63 tokens into 6 equal"):
        tokens_of_rank(63, 3, 0, "gather")


@pytest.fixture
def cluster():
    """Function that starts torch's fake process group: this process is the only real rank."""

    def start(ranks, rank=0):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)

    yield start
    dist.destroy_process_group()


def test_a_probe_needs_full_rows(cluster):
    cluster(2)
    decoder = make(RoPE())
    decoder.set_context_group(ContextGroup(dist.group.WORLD, "gather"))
    with pytest.raises(ValueError, match="a probe needs full rows"), decoder.probed(Probe()):
        pass


class Sent(TorchDispatchMode):
    """Count the elements that this rank sends: (P - 1) / P of an all-to-all, a ring's share of an all-gather."""

    def __init__(self):
        super().__init__()
        self.elements, self.names = 0.0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "_c10d_functional" and "wait" not in func._opname:
            self.names.append(func._opname)
            ranks, elements = dist.get_world_size(), args[0].numel()
            share = {"all_gather_into_tensor": ranks - 1}.get(func._opname, (ranks - 1) / ranks)
            self.elements += elements * share
        return result


def elements_sent(scheme, ranks, mode):
    """Return the elements sent in forward and backward of an attention layer, per rank and token of a rank."""
    config = DecoderConfig(**{**GEOMETRY, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128})
    layer, tokens = Attention(config, scheme, 0), 2 * ranks
    layer.set_scheme_tensors(scheme, Frequencies())
    with FakeTensorMode(allow_non_fake_inputs=True):
        group = ContextGroup(dist.group.WORLD, mode)
        layer.context_group = group
        hidden = torch.zeros(1, tokens // ranks, config.hidden_size, requires_grad=True)
        documents = group.shard.take_documents(None, 1, tokens)
        positions = torch.arange(tokens)[None] if documents is None else documents.positions
        tables = scheme.tables(positions, Frequencies(), head_dim=128, dtype=torch.float32)
        with Sent() as forward:
            output = layer(hidden, tables, documents=documents)
        with Sent() as backward:
            output.sum().backward()
    expected = {"heads": ["all_to_all_single"] * 4, "gather": ["all_gather_into_tensor"]}[mode]
    assert forward.names == expected
    assert backward.names == (expected if mode == "heads" else ["reduce_scatter_tensor"])
    assert forward.elements == backward.elements
    return forward.elements / (tokens // ranks)


PAGE = Path(__file__).parents[2] / "recipes" / "devices.md"


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_communication_equals_the_formula_and_the_table(ranks, cluster):
    cluster(ranks)
    cells = [f"{ranks}"]
    for name in ("rope", "eh", "ec"):
        layout = ALL_SCHEMES[name].head_layout(num_attention_heads=32, num_key_value_heads=8, head_dim=128)
        counted = {mode: elements_sent(ALL_SCHEMES[name], ranks, mode) for mode in MODES}
        assert counted == {mode: elements_moved(layout, 128, ranks, mode) for mode in MODES}
        assert choose_mode(layout, 128, ranks) == min(MODES, key=lambda mode: (counted[mode], mode))
        cells += [f"{2 * counted[mode] / 1024:.1f}" for mode in MODES]
    assert f"| {' | '.join(cells)} |" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["alibi", "fope", "pope"])
def test_communication_of_other_schemes(name, cluster):
    cluster(4)
    layout = ALL_SCHEMES[name].head_layout(num_attention_heads=32, num_key_value_heads=8, head_dim=128)
    for mode in MODES:
        assert elements_sent(ALL_SCHEMES[name], 4, mode) == elements_moved(layout, 128, 4, mode)
