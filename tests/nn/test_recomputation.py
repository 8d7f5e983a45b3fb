"""Number of recomputed operations in the backward pass, and the results."""

from collections import Counter

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils._python_dispatch import TorchDispatchMode

from ropepp_lit.nn import Decoder, DecoderConfig, Frequencies, RoPEPP
from ropepp_lit.nn.documents import Documents
from ropepp_lit.nn.recomputation import attention_operations

LAYERS, TOKENS, CHUNK = 2, 32, 10
CHUNKS = 4
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
BLOCK, SELECTIVE = {"checkpoint_every": 1}, {"checkpoint_every": 1, "keep_attention": True}
CHUNKED = {"mlp_chunk_tokens": CHUNK}


class Count(TorchDispatchMode):
    """Count operations by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.counts[function.__name__.split(".")[0]] += 1
        return function(*arguments, **(keywords or {}))


def make_decoder(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        mlp_bias=True,
    )
    decoder = Decoder(config, RoPEPP(), Frequencies()).to(dtype)
    decoder.save_memory(**settings)
    return decoder


def step(decoder, *, packed=False, autocast=False):
    """Return loss and gradients of one batch, and the number of operations."""
    ids = torch.randint(0, 64, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    documents = Documents.from_ids((ids == 3).cumsum(1)) if packed else None
    with Count() as count:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = decoder.loss(ids, ids.roll(-1, 1), documents=documents)
        loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in decoder.parameters())], count.counts


@pytest.mark.parametrize(
    ("settings", "attention", "mlps"),
    [
        ({}, 1, 1),
        (BLOCK, 2, 2),
        (SELECTIVE, 1, 2),
        (CHUNKED, 1, 2 * CHUNKS),
        (BLOCK | CHUNKED, 2, 2 * CHUNKS),
        (SELECTIVE | CHUNKED, 1, 2 * CHUNKS),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_number_of_operations(settings, attention, mlps, packed):
    expected, plain = step(make_decoder(), packed=packed)
    actual, counts = step(make_decoder(**settings), packed=packed)
    assert counts[ATTENTION] == attention * plain[ATTENTION]
    assert counts["silu"] == mlps * LAYERS
    for one, other in zip(expected, actual, strict=True):
        if "mlp_chunk_tokens" in settings:  # sums over tokens have another order
            torch.testing.assert_close(other, one, atol=1e-7, rtol=1e-5)
        else:
            assert torch.equal(one, other)


@pytest.mark.parametrize("settings", [SELECTIVE, CHUNKED, SELECTIVE | CHUNKED])
def test_results_in_float64_and_under_autocast(settings):
    for dtype, autocast, tolerance in ((torch.float64, False, 1e-15), (torch.float32, True, 1e-3)):
        expected, _ = step(make_decoder(dtype), autocast=autocast)
        actual, _ = step(make_decoder(dtype, **settings), autocast=autocast)
        for one, other in zip(expected, actual, strict=True):
            torch.testing.assert_close(other, one, atol=tolerance, rtol=0)


def test_chunks_with_frozen_weights_and_without_gradients():
    """As in fine-tuning: only some weights are trained, and the input may need no gradient."""
    gradients = []
    for settings in ({}, CHUNKED, BLOCK | CHUNKED):
        decoder = make_decoder(torch.float64, **settings).requires_grad_(False)
        decoder.model.layers[0].mlp.up_proj.requires_grad_(True)
        step(decoder)
        gradients.append(decoder.model.layers[0].mlp.up_proj.weight.grad)
        assert decoder.model.layers[0].mlp.gate_proj.weight.grad is None
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-15, rtol=0)
    ids = torch.arange(TOKENS)[None]
    with torch.no_grad():
        logits = [make_decoder(**settings)(ids) for settings in ({}, CHUNKED)]
    torch.testing.assert_close(*logits)


def test_compiled_block_is_one_graph_without_extra_operations():
    graphs = {"forward": [], "backward": []}

    def compiler(name):
        def compile_graph(module, inputs):
            names = (str(node.target).split(".") for node in module.graph.nodes if node.op == "call_function")
            graphs[name].append(Counter(parts[1] for parts in names if parts[0] == "aten"))
            return make_boxed_func(module.forward)

        return compile_graph

    counters.clear()
    torch.compiler.reset()
    expected, _ = step(make_decoder())
    decoder = make_decoder(**SELECTIVE, **CHUNKED)
    backend = aot_autograd(
        fw_compiler=compiler("forward"),
        bw_compiler=compiler("backward"),
        partition_fn=min_cut_rematerialization_partition,
    )
    for block in decoder.model.layers:
        block.compile(backend=backend)
    ids = torch.randint(0, 64, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    loss = decoder.loss(ids, ids.roll(-1, 1))
    loss.backward()
    for one, other in zip(expected[1:], decoder.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one, atol=1e-6, rtol=1e-5)
    assert not counters["graph_break"]
    (forward,), (backward,) = graphs.values()  # the blocks share them
    assert (forward[ATTENTION], backward[ATTENTION]) == (1, 0)
    assert (forward["silu"], backward["silu"]) == (CHUNKS, CHUNKS)


def test_every_fused_attention_is_known():
    names = {str(operation).split(".")[1] for operation in attention_operations()}
    assert {"_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention", "_varlen_attn"} <= names
    fused = {
        name
        for name in dir(torch.ops.aten)
        if name.startswith("_scaled_dot_product") and not name.endswith(("_backward", "_math", "quantized"))
    }
    assert fused <= names, fused - names
