"""Operations of the forward pass with loss on fake CUDA tensors, under CUDA's autocast rules.

Fake tensors have shapes, dtypes and devices but no memory, so no GPU is needed. Their backward pass needs a driver, so
only the forward pass is recorded; the loss computes its gradients there. The kernel that SDPA selects on a GPU is not
visible.
"""

from collections import Counter
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from plain_schemes import ALL_SCHEMES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ropepp_lit.data.batch import Batch
from ropepp_lit.nn import (
    Decoder,
    DecoderConfig,
    Documents,
    Frequencies,
    NoPE,
    RoPE,
    RoPEPP,
    kernels,
)
from ropepp_lit.nn.context_parallel import ContextGroup
from ropepp_lit.nn.generation import generate
from ropepp_lit.nn.lora import LoRA, inject
from ropepp_lit.train.loss_average import StepAverage
from ropepp_lit.train.metrics import PairLoss
from ropepp_lit.train.pair_training import PairTraining
from ropepp_lit.train.preference import DPO

TOKENS, LAYERS = 80, 2
CONFIG = {
    "vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
HOST_READS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique", "is_nonzero")


class Watch(TorchDispatchMode):
    """Count operations, and record the inputs of attention and all tensors that are quadratic in the context.

    SDPA is replaced: what it chooses for fake tensors is not what it chooses on a GPU.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.attention, self.quadratic = Counter(), [], []
        self.host_reads, self.products = [], []

    def __enter__(self):
        self._patch = patch.object(torch.nn.functional, "scaled_dot_product_attention", self._sdpa)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *exception):
        self._patch.stop()
        return super().__exit__(*exception)

    def _sdpa(self, queries, keys, values, mask=None, *, is_causal, scale, enable_gqa):
        assert enable_gqa == (queries.shape[1] != keys.shape[1])
        is_one_query = queries.shape[2] <= 4  # the heads that share a key/value head in place of queries
        assert mask is not None or is_causal or is_one_query
        self.operations["sdpa"] += 1
        self.attention.append([queries, keys, values])
        return torch.empty_like(queries.transpose(1, 2)).transpose(1, 2)  # strides as a flash kernel leaves them

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.operations[name] += 1
        if name == "_to_copy" and args[0].is_floating_point() and args[0].dtype != result.dtype:
            self.operations["cast"] += 1
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if name == "_varlen_attn":
            self.attention.append(tensors)
        if name in HOST_READS and any(x.is_cuda for x in tensors):
            self.host_reads.append(name)
        if name in ("mm", "addmm"):
            self.products.append((name, tuple(result.shape)))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor) and list(x.shape).count(TOKENS) > 1:
                self.quadratic.append((name, tuple(x.shape)))
        return result


@contextmanager
def fake_cuda(*, autocast):
    """Fake mode with CUDA as the default device, and optional autocast to bfloat16."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.device("cuda:0"):
        torch.set_autocast_enabled("cuda", autocast)
        try:
            yield mode
        finally:
            torch.set_autocast_enabled("cuda", False)


def watch(
    scheme,
    *,
    packed,
    weights=torch.float32,
    autocast=True,
    switches=None,
    places=False,
    implementation=None,
    group=None,
    lora=None,
):
    input_ids = torch.randint(2, 64, (2, TOKENS))
    input_ids[:, ::17] = 1
    documents = Documents.from_ids((input_ids == 1).cumsum(1)) if packed else None
    labels = input_ids.roll(-1, 1).masked_fill(input_ids == 1, -100)
    if group is not None:  # on the CPU, as where a batch is made
        documents = group.shard.take_documents(documents, 2, TOKENS)
        input_ids, labels = group.shard.take(input_ids), group.shard.take(labels)
    index = (labels != -100).flatten().nonzero().flatten() if places else None
    torch.set_default_dtype(weights)
    try:
        with torch.device("meta"):
            decoder = Decoder(DecoderConfig(**CONFIG, **(switches or {})), scheme, Frequencies())
            if lora is not None:
                inject(decoder, lora)
        with fake_cuda(autocast=autocast) as mode:

            def move(x):
                return mode.from_tensor(x).to("cuda:0") if isinstance(x, torch.Tensor) else x

            decoder.to_empty(device="cuda:0")
            for block in decoder.model.layers:
                block.self_attn.implementation = implementation
            decoder.set_context_group(group)
            moved = tree_map(move, documents)
            with Watch() as seen:
                loss = decoder.loss(
                    move(input_ids), move(labels), documents=moved, reduction="sum", label_indices=move(index)
                )
            assert loss.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    return seen


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("switches", [{}, {"qk_norm": True, "attention_gate": "element", "score_scaling": "log"}])
@pytest.mark.parametrize(("weights", "autocast"), [(torch.float32, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("scheme", ALL_SCHEMES)
def test_attention_is_a_flash_kernel_in_bfloat16(scheme, weights, autocast, switches, packed):
    # float32 weights under autocast: one GPU and DDP; bfloat16 without: FSDP2's policy, and bf16-true.
    seen = watch(ALL_SCHEMES[scheme], packed=packed, weights=weights, autocast=autocast, switches=switches)
    assert len(seen.attention) == LAYERS
    for tensors in seen.attention:
        assert [x.dtype for x in tensors[:3]] == [torch.bfloat16] * 3
        assert [x.stride(-1) for x in tensors[:3]] == [1] * 3
        assert [x.shape[-1] % 8 for x in tensors[:3]] == [0] * 3
        if packed:
            assert [x.dtype for x in tensors[3:]] == [torch.int32] * 2
    assert seen.quadratic == []
    assert seen.host_reads == []
    assert seen.operations["_varlen_attn" if packed else "sdpa"] == LAYERS


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("base_dtype", "autocast"), [(None, True), ("bfloat16", True), ("bfloat16", False)])
def test_float32_adapters_leave_attention_in_bfloat16(base_dtype, autocast, dora):
    """With a base in either dtype; the frozen output layer gets no gradient, and nothing synchronizes."""
    lora = LoRA(rank=8, base_dtype=base_dtype, dora=dora, train_fully=["imaginary", "norms"])
    for packed in (False, True):
        seen = watch(RoPEPP(variant="ec"), packed=packed, autocast=autocast, lora=lora)
        assert {x.dtype for tensors in seen.attention for x in tensors[:3]} == {torch.bfloat16}
        assert seen.host_reads == []
        assert seen.quadratic == []
        assert (CONFIG["vocab_size"], CONFIG["hidden_size"]) not in {shape for _, shape in seen.products}
        assert seen.operations["_varlen_attn" if packed else "sdpa"] == LAYERS


@pytest.mark.parametrize(
    ("weights", "autocast", "qk_norm", "per_layer"),
    [
        # Four projections of attention and three of the MLP, and the two inputs that they share; the output layer once.
        (torch.float32, True, False, 7 + 2),
        (torch.float32, True, True, 7 + 2 + 4),  # CUDA's autocast computes both norms in float32
        (torch.bfloat16, False, False, 0),
        (torch.bfloat16, False, True, 0),
    ],
)
def test_casts_of_a_layer(weights, autocast, qk_norm, per_layer):
    counts = {}
    for scheme in (NoPE(), RoPE(), RoPEPP(variant="ec")):
        seen = watch(scheme, packed=True, weights=weights, autocast=autocast, switches={"qk_norm": qk_norm})
        counts[str(scheme)] = seen.operations["cast"]
    # The loss: autocast's input and weight of the output layer; the gradients of logits and of the weight.
    outside = 4 if autocast else 2
    # A rotation rounds two halves of queries and of keys; imaginary queries are made of rounded ones.
    rotation = 4
    assert counts == {
        "NoPE": per_layer * LAYERS + outside,
        "RoPE": (per_layer + rotation) * LAYERS + outside,
        "RoPE++ EC": (per_layer + rotation) * LAYERS + outside,
    }


@pytest.mark.parametrize("places", [False, True])
def test_loss_computes_only_labels_that_are_not_ignored(places):
    seen = watch(RoPE(), packed=True, places=places)
    assert seen.host_reads == []
    rows = {shape[0] for name, shape in seen.products if name == "mm" and shape[1] == CONFIG["vocab_size"]}
    assert rows == {150 if places else 160}


@pytest.mark.parametrize("over", ["conversations", "pairs"])
def test_packed_conversations_do_not_synchronize(over, monkeypatch):
    """A batch as in training, with padding, few trained tokens and weights; the average at the end of a step."""
    holds_pairs = over == "pairs"
    # Fake tensors on CUDA have no backward pass; that of a few numbers is part of the loss of pairs.
    monkeypatch.setattr(torch.autograd, "grad", lambda value, losses: (torch.zeros_like(losses),))
    tokens = torch.randint(2, 64, (2, TOKENS + 1))
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[0, [20, 33, 70]] = starts[1, [50]] = True
    labels = tokens[:, 1:].masked_fill(starts[:, 1:] | (torch.rand(2, TOKENS) < 0.6), -100)
    labels[0, 33 if holds_pairs else 70 :] = -100  # padding
    options = {"weighs_documents": not holds_pairs, "holds_pairs": holds_pairs}
    batch = Batch.create(tokens[:, :-1], labels, Documents.from_starts(starts[:, :-1]), **options)
    with torch.device("meta"):
        decoder = Decoder(DecoderConfig(**CONFIG), RoPEPP(variant="ec"), Frequencies())
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        with fake_cuda(autocast=True) as mode:
            decoder.to_empty(device="cuda:0")

            def move(x):
                return mode.from_tensor(x).to("cuda:0") if isinstance(x, torch.Tensor) else x

            moved = tree_map(move, batch)
            average, metric, training = StepAverage(over), PairLoss(), PairTraining(DPO() if holds_pairs else None)
            for name, value in metric.states.items():
                setattr(metric, name, move(value))
            if holds_pairs:
                reference = torch.zeros(2, 2, dtype=torch.float64)
                training.reference = SimpleNamespace(look_up=lambda keys: mode.from_tensor(reference))
            for parameter in decoder.parameters():
                parameter.grad = torch.empty_like(parameter)
            trainer = SimpleNamespace(
                world_size=4, accumulate_grad_batches=2, strategy=SimpleNamespace(root_device=torch.device("cuda:0"))
            )
            with Watch() as seen:
                _ = training.loss(decoder, moved, metric) if holds_pairs else moved.loss(decoder)
                average.add(moved)
                average.rescale(decoder.parameters(), trainer, num_positions=2 * TOKENS)
                assert average.read_count(torch.device("cuda:0"))[0].is_cuda
    finally:
        dist.destroy_process_group()
    assert seen.host_reads == []
    assert seen.quadratic == []
    assert seen.operations["_varlen_attn"] == LAYERS
    rows = {shape[0] for name, shape in seen.products if name == "mm" and shape[1] == CONFIG["vocab_size"]}
    assert rows == {batch.num_labels}


def flash_attn_signature(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None, *, checked,
):  # fmt: skip
    """Mock of `flash_attn_varlen_func` of flash-attn 2.7 and 2.8: its arguments and the checks of its kernel."""
    for x in (q, k, v):
        assert x.dim() == 3
        assert x.dtype in (torch.float16, torch.bfloat16)
        assert x.dtype == q.dtype
        assert x.stride(-1) == 1
        assert x.shape[-1] == q.shape[-1] <= 256
    assert q.shape[1] % k.shape[1] == 0
    assert k.shape == v.shape
    for bounds in (cu_seqlens_q, cu_seqlens_k):
        assert bounds.dtype == torch.int32
        assert bounds.is_contiguous()
    assert isinstance(max_seqlen_q, int)
    assert isinstance(max_seqlen_k, int)
    assert causal
    checked.append((max_seqlen_q, deterministic))
    if q.device.type != "cpu":
        return torch.empty_like(q)
    # The result by a mask, written plainly.
    owner = torch.bucketize(torch.arange(q.shape[0]), cu_seqlens_q[1:], right=True)
    mask = (owner[:, None] == owner[None]).tril()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q.double(), k.double()) * (softmax_scale or q.shape[-1] ** -0.5)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v.double()).to(q.dtype)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("scheme", ["rope", "ec", "alibi"])
def test_arguments_of_flash_attn(scheme, deterministic, monkeypatch):
    checked = []
    monkeypatch.setattr(kernels, "flash_attn_varlen_func", partial(flash_attn_signature, checked=checked))
    torch.use_deterministic_algorithms(deterministic)
    try:
        watch(ALL_SCHEMES[scheme], packed=True, implementation="flash_attn")
    finally:
        torch.use_deterministic_algorithms(False)
    assert checked == [(17, deterministic)] * LAYERS  # the longest document, not the row


@torch.no_grad()
def test_flash_attn_equals_sdpa(monkeypatch):
    torch.manual_seed(0)
    input_ids = torch.randint(2, 64, (2, TOKENS))
    input_ids[:, ::17] = 1
    documents = Documents.from_ids((input_ids == 1).cumsum(1))
    queries, keys, values = (torch.randn(2, TOKENS, heads, 32).bfloat16() for heads in (8, 2, 2))
    expected = kernels.attend(queries, keys, values, documents=documents, scale=0.2)
    monkeypatch.setattr(kernels, "flash_attn_varlen_func", partial(flash_attn_signature, checked=[]))
    flat = (x.flatten(0, 1) for x in (queries, keys, values))
    bounds, longest = documents.cu_seqlens, documents.longest
    segments = kernels.Segments(bounds, bounds, longest, longest)
    actual = kernels.attend_packed(*flat, segments, scale=0.2, implementation="flash_attn")
    torch.testing.assert_close(actual.view_as(expected), expected, atol=2e-2, rtol=2e-2)


def test_older_varlen_attn_gets_repeated_heads(monkeypatch):
    def without_groups(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
        assert query.shape == key.shape == value.shape
        assert window_size == (-1, 0)
        return torch.empty_like(query)

    monkeypatch.setattr(kernels, "VARLEN_IS_GROUPED", False)
    monkeypatch.setattr(kernels, "varlen_attn", without_groups)
    watch(RoPEPP(variant="ec"), packed=True, implementation="varlen")


def test_float32_rows_build_no_mask():
    seen = watch(RoPE(), packed=False, autocast=False)
    for queries, keys, _ in seen.attention:
        assert queries.dtype == torch.float32
        assert queries.shape == keys.shape  # grouped heads would leave torch the kernel that holds all scores
    assert seen.quadratic == []


def test_generation_does_not_synchronize():
    with fake_cuda(autocast=True), torch.no_grad():
        decoder = Decoder(DecoderConfig(**CONFIG), RoPEPP(variant="ec"), Frequencies())
        prompt = torch.zeros(1, 8, dtype=torch.int64)
        with Watch() as seen:
            tokens = list(generate(decoder, prompt, max_new_tokens=3))
    assert len(tokens) == 3
    assert seen.host_reads == []


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("scheme", ALL_SCHEMES)
def test_gathered_keys_and_values_use_a_memory_efficient_kernel(scheme, packed):
    """Context parallelism in the mode `gather`, as one of four ranks."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        seen = watch(ALL_SCHEMES[scheme], packed=packed, group=ContextGroup(dist.group.WORLD, "gather"))
    finally:
        dist.destroy_process_group()
    calls = LAYERS if packed else 2 * LAYERS  # plain rows: one for each of the rank's chunks
    assert seen.operations["_varlen_attn"] == calls == len(seen.attention)
    for queries, keys, values, *bounds in seen.attention:
        assert [x.dtype for x in (queries, keys, values)] == [torch.bfloat16] * 3
        assert [x.stride(-1) for x in (queries, keys, values)] == [1] * 3
        assert [x.dtype for x in bounds] == [torch.int32] * 2
    if scheme != "alibi":  # keys and values of 40 dimensions each are together as wide as a row is long
        assert seen.quadratic == []
    assert seen.host_reads == []
