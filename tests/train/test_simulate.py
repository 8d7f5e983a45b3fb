"""Simulated steps: collectives and FLOPs compared with formulas, memory with the estimate, recipes on clusters."""

import dataclasses
import itertools
import random
import time

import pytest
import torch

from ropepp_lit.nn import ALiBi, Decoder, DecoderConfig, Frequencies, PoPE, RoPE, RoPEPP
from ropepp_lit.nn.context_parallel import elements_moved
from ropepp_lit.nn.lora import LoRA
from ropepp_lit.train.costs import training_flops
from ropepp_lit.train.counting import Collective
from ropepp_lit.train.lora import trained_shapes
from ropepp_lit.train.memory import PARTS, StepMemory
from ropepp_lit.train.optimizer import AdamW, Muon
from ropepp_lit.train.plan import plan
from ropepp_lit.train.simulate import simulate
from ropepp_lit.train.step_setup import Setup

# All sizes are multiples of 8, so that shards need no padding.
TINY = DecoderConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
)
EMBEDDING = 512 * 64
EC = RoPEPP(variant="ec")


def run_step(setup, *, config=TINY, scheme=EC, optimizer=None):
    return simulate(
        setup, config=config, scheme=scheme, frequencies=Frequencies(), optimizer=optimizer or AdamW(lr=1e-3)
    )


def meta(config=TINY, scheme=EC):
    with torch.device("meta"):
        return Decoder(config, scheme, Frequencies())


@pytest.mark.parametrize("devices", [2, 1024])
def test_ddp_sends_each_gradient_twice(devices):
    """Ring all-reduce: a reduce-scatter and an all-gather of N / P elements, P - 1 times each."""
    setup = Setup(rows=1, context_length=64, strategy="ddp", devices=devices, accumulate_grad_batches=3)
    counts = run_step(setup).counts
    assert set(counts.calls) == {Collective("all-reduce", devices)}
    assert counts.sent[Collective("all-reduce", devices)] == 2 * (devices - 1) / devices * 4 * meta().num_parameters


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize(("precision", "gathered"), [("32-true", 4), ("bf16-mixed", 2)])
def test_fsdp2_gathers_blocks_twice_and_reduces_in_float32(devices, precision, gathered):
    setup = Setup(rows=1, context_length=64, strategy="fsdp2", devices=devices, precision=precision)
    counts, parameters = run_step(setup).counts, meta().num_parameters
    blocks = parameters - 2 * EMBEDDING - 64  # the last norm is gathered once, separately
    share = (devices - 1) / devices
    gathers, scatters = Collective("all-gather", devices), Collective("reduce-scatter", devices)
    assert dict(counts.calls) == {gathers: 2 * 3 + 3, scatters: 3 + 3}
    assert counts.sent[gathers] == share * gathered * (parameters + blocks)
    assert counts.sent[scatters] == share * 4 * parameters


@pytest.mark.parametrize(
    ("changes", "gathers", "scatters"),
    [({}, 4, 4), ({"reduce_each_micro_batch": False}, 4, 1), ({"reshard_after_forward": False}, None, 4)],
)
def test_accumulation_counts_every_micro_batch(changes, gathers, scatters):
    """Two of four micro-batches are simulated; without resharding, parameters are gathered once per step."""
    setup = Setup(rows=1, context_length=64, strategy="fsdp2", devices=8, accumulate_grad_batches=4, **changes)
    counts, parameters = run_step(setup).counts, meta().num_parameters
    total, blocks = 4 * parameters * 7 / 8, 4 * (parameters - 2 * EMBEDDING - 64) * 7 / 8
    expected = total if gathers is None else gathers * (total + blocks)
    assert counts.sent[Collective("all-gather", 8)] == expected
    assert counts.sent[Collective("reduce-scatter", 8)] == scatters * total


@pytest.mark.parametrize(("devices", "replicas"), [(8, 2), (1024, 128)])
def test_hsdp_reduces_shards_over_replicas(devices, replicas):
    setup = Setup(rows=1, context_length=64, strategy="fsdp2", devices=devices, replicate_size=replicas)
    step, parameters, sharing = run_step(setup), meta().num_parameters, devices // replicas
    sent = step.counts.sent
    assert sent[Collective("reduce-scatter", sharing)] == (sharing - 1) / sharing * 4 * parameters
    assert sent[Collective("all-reduce", replicas)] == 2 * (replicas - 1) / replicas * 4 * parameters / sharing
    assert step.memory["optimizer"] == pytest.approx(8 * parameters / sharing, rel=0.01)


def test_sequence_parallelism_exchanges_heads():
    """Forward and backward: queries of 8 heads, keys and values of 4, outputs of 16, each of head_dim 8, in float32."""
    setup = Setup(rows=2, context_length=64, strategy="fsdp2", devices=8, context_parallel_size=4)
    counts, tokens = run_step(setup).counts, 2 * 64 // 4
    exchanges = Collective("all-to-all", 4)
    assert counts.calls[exchanges] == 3 * 2 * 4
    assert counts.sent[exchanges] == 3 / 4 * 3 * 2 * tokens * 8 * (8 + 2 * 4 + 16) * 4


@pytest.mark.parametrize("scheme", [EC, ALiBi()], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_gathering_sends_keys_and_values_and_divides_the_flops(scheme, groups):
    """A reduce-scatter sends as much as its all-gather; groups of heads are gathered again in the backward pass."""
    setup = Setup(rows=2, context_length=64, strategy="fsdp2", devices=8, attention_head_groups=groups)
    full_rows = run_step(setup, scheme=scheme).counts
    shared = dataclasses.replace(setup, context_parallel_size=4, context_parallel_mode="gather")
    counts, layout = run_step(shared, scheme=scheme).counts, meta(scheme=scheme).head_layout
    sent = elements_moved(layout, 8, 4, "gather") * 2 * 64 // 4 * 3 * 4
    gathers, scatters = Collective("all-gather", 4), Collective("reduce-scatter", 4)
    assert (counts.calls[gathers], counts.calls[scatters]) == (3 * groups * groups, 3 * groups)
    assert (counts.sent[gathers], counts.sent[scatters]) == (groups * sent, sent)
    assert counts.flops == full_rows.flops / 4


@pytest.mark.parametrize("scheme", [RoPE(), EC, PoPE()], ids=str)
def test_flops_are_the_formula_plus_recomputed_scores(scheme):
    """Flash attention recomputes the scores in the backward pass: 14 instead of 12 in the formula."""
    counts, layout = run_step(Setup(rows=2, context_length=64), scheme=scheme).counts, meta(scheme=scheme).head_layout
    matrices = meta(scheme=RoPE() if isinstance(scheme, PoPE) else scheme).num_parameters - EMBEDDING - 7 * 64
    pairs = 2 * 64 * 65 / 2
    scores = 14 * 3 * layout.num_attention_heads * (8 + layout.extra_dims) * pairs
    assert counts.flops == 6 * matrices * 2 * 64 + scores


def test_checkpointing_recomputes_blocks():
    setups = [Setup(rows=1, context_length=64, activation_checkpointing=every) for every in (0, 1)]
    plain, again = (run_step(setup).counts.flops for setup in setups)
    matrices = (
        meta().num_parameters - 2 * EMBEDDING - 7 * 64 - 3 * 96 * 64
    )  # all except down_proj, whose output is not needed
    assert again - plain == 2 * matrices * 64 + 4 * 3 * 16 * 8 * 64 * 65 / 2


def test_cost_of_the_loss():
    loss = run_step(Setup(rows=2, context_length=64)).loss
    assert loss.flops == 6 * EMBEDDING * 128
    logits = 128 * 512 * 4
    assert 2 * logits < loss.memory < 4 * logits + 3 * 4 * EMBEDDING
    assert loss.bytes > 3 * 2 * logits


def test_parts_of_the_memory():
    """Parameters, gradients and optimizer states of a step with few activations; their shards with FSDP2."""
    parameters = meta().num_parameters
    memory = run_step(Setup(rows=1, context_length=8, accumulate_grad_batches=2)).memory
    assert memory["parameters"] == pytest.approx(4 * parameters, rel=0.01)
    assert memory["gradients"] == pytest.approx(4 * parameters, rel=0.01)
    assert memory["optimizer"] == pytest.approx(8 * parameters, rel=0.01)
    sharded = run_step(Setup(rows=1, context_length=8, strategy="fsdp2", devices=8)).memory
    assert sharded["optimizer"] == pytest.approx(parameters, rel=0.01)
    matrices = parameters - 2 * EMBEDDING - 7 * 64
    memory = run_step(Setup(rows=1, context_length=1024), optimizer=Muon(lr=1e-3)).memory
    assert memory["optimizer"] == pytest.approx(8 * parameters - 4 * matrices, rel=0.01)


def test_offloaded_inputs_are_not_on_the_device():
    stored, offloaded = (
        run_step(Setup(rows=1, context_length=1024, activation_checkpointing=1, offload_activations=offloads)).memory
        for offloads in (False, True)
    )
    # In the loss, which is the peak; cosines and sines are offloaded too.
    assert stored["activations"] - offloaded["activations"] == pytest.approx(3 * 1024 * 64 * 4, rel=0.1)


GEOMETRIES = {
    "tied": (
        DecoderConfig(
            vocab_size=4096, hidden_size=512, intermediate_size=1408, num_hidden_layers=3, num_attention_heads=8,
            num_key_value_heads=4, tie_word_embeddings=True,
        ),
        8192,
    ),
    "376m": (DecoderConfig(size="376m", num_hidden_layers=2), 4096),
    "8b": (
        DecoderConfig(
            vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=2,
            num_attention_heads=32, num_key_value_heads=8,
        ),
        8192,
    ),
    "long": (
        DecoderConfig(
            vocab_size=2000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=2, num_attention_heads=16,
            num_key_value_heads=4, qk_norm=True,
        ),
        65_536,
    ),
    "short": (DecoderConfig(size="376m", num_hidden_layers=2), 256),
}  # fmt: skip
GRID = {
    "geometry": list(GEOMETRIES),
    "scheme": [RoPE(), EC, RoPEPP(variant="eh"), ALiBi(), PoPE()],
    "memory": [
        {}, {"activation_checkpointing": 1}, {"activation_checkpointing": 2}, {"activation_checkpointing": "attention"},
        {"mlp_chunk_tokens": 1024, "attention_head_groups": 2},
        {"activation_checkpointing": 1, "mlp_chunk_tokens": 1024},
    ],
    "strategy": [
        {}, {"strategy": "ddp", "devices": 8}, {"strategy": "fsdp2", "devices": 32},
        {"strategy": "fsdp2", "devices": 8, "context_parallel_size": 2},
        {"strategy": "fsdp2", "devices": 32, "replicate_size": 4, "context_parallel_size": 4,
         "context_parallel_mode": "gather"},
    ],
    "precision": ["32-true", "bf16-mixed", "bf16-true"],
    "gradients": [
        {}, {"accumulate_grad_batches": 4}, {"accumulate_grad_batches": 4, "reduce_each_micro_batch": False},
        {"reshard_after_forward": False},
    ],
}  # fmt: skip


def pairwise():
    """Return cases of the grid such that every pair of values of two dimensions occurs in one of them."""
    dimensions, draw = list(GRID.values()), random.Random(0)

    def pairs(case):
        return set(itertools.combinations(enumerate(case), 2))

    missing = set().union(*(pairs(case) for case in itertools.product(*(range(len(values)) for values in dimensions))))
    while missing:
        (i, a), (j, b) = min(missing)
        cases = []
        for _ in range(200):
            case = [draw.randrange(len(values)) for values in dimensions]
            case[i], case[j] = a, b
            cases.append(case)
        best = max(cases, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        yield tuple(values[place] for values, place in zip(dimensions, best, strict=True))


def check(geometry, scheme, memory, strategy, precision, gradients):
    config, context = GEOMETRIES[geometry]
    setup = Setup(rows=1, context_length=context, precision=precision, **memory, **strategy, **gradients)
    decoder = meta(config, scheme)
    estimate = StepMemory(config, decoder.head_layout, setup, num_parameters=decoder.num_parameters).peak()
    simulated = sum(run_step(setup, config=config, scheme=scheme).memory.values())
    assert estimate.total == pytest.approx(simulated, rel=0.15), (
        f"{setup}, {scheme}: {estimate.total / 2**20:.0f} MiB ({estimate.moment}), simulated {simulated / 2**20:.0f}"
    )


@pytest.mark.slow
def test_the_estimate_is_within_15_percent_of_the_simulation():
    for case in pairwise():
        check(*case)


ADAPTERS = {
    "all": LoRA(),
    "half": LoRA(base_dtype="bfloat16", train_fully=["imaginary"]),
    "embeddings": LoRA(rank=16, train_fully=["embed_tokens", "lm_head"], dora=True),
}
SETUPS = {
    "fsdp2": {"strategy": "fsdp2", "devices": 8, "precision": "bf16-mixed", "activation_checkpointing": 1},
    "fsdp2-true": {"strategy": "fsdp2", "devices": 8},
    "ddp": {"strategy": "ddp", "devices": 8, "precision": "bf16-mixed", "accumulate_grad_batches": 2},
    "one": {"precision": "32-true"},
}


@pytest.mark.parametrize("lora", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("geometry", ["8b", "tied"])
def test_a_frozen_base_has_no_gradients_and_no_optimizer_states(geometry, lora):
    """LoRA at the width of Llama 3 8B: the estimate, and bytes reduced and gathered."""
    config, context = GEOMETRIES[geometry]
    for name, settings in SETUPS.items():
        setup = Setup(rows=1, context_length=context, lora=lora, **settings)
        simulation = run_step(setup, config=config)
        decoder = meta(config)
        estimate = StepMemory(config, decoder.head_layout, setup, num_parameters=decoder.num_parameters).peak()
        assert estimate.total == pytest.approx(sum(simulation.memory.values()), rel=0.15), name
        trained = sum(shape.numel() for shape in trained_shapes(decoder, lora).values())
        assert simulation.memory["optimizer"] == pytest.approx(8 * trained / setup.shards, rel=0.01)
        sent = simulation.counts.sent
        if setup.strategy == "fsdp2":
            assert sent[Collective("reduce-scatter", 8)] == pytest.approx(7 / 8 * 4 * trained, rel=0.01)
        elif setup.strategy == "ddp":
            assert sent[Collective("all-reduce", 8)] == pytest.approx(2 * 7 / 8 * 4 * trained, rel=0.01)


def test_flops_of_lora_equal_the_formula():
    """The base has no weight gradients: a factor of 4 instead of 6 for its parameters."""
    lora, setup = LoRA(rank=8), Setup(rows=2, context_length=64)
    counts = run_step(dataclasses.replace(setup, lora=lora)).counts
    formula = training_flops(TINY, meta().head_layout, tokens=128, pairs=2 * 64 * 65 / 2, lora=lora)
    scores = 2 * 3 * 16 * 8 * 2 * 64 * 65 / 2  # flash attention recomputes them
    assert counts.flops == pytest.approx(formula + scores, rel=0.03)  # less what nothing before needs


@pytest.mark.slow
@pytest.mark.parametrize("geometry", list(GEOMETRIES))
def test_the_estimate_over_the_complete_grid(geometry):
    for case in itertools.product(*list(GRID.values())[1:]):
        check(geometry, *case)


def simulated_plan(capsys, *options):
    """Return the numbers printed by `plan --simulate true`: simulated and estimated GiB by part, and collectives."""
    plan([*options, "--simulate", "true"])
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    cells = {row[1].strip(): row[2:] for row in rows}
    memory = {part: [float(cell.split()[0]) for cell in cells[part][:2]] for part in (*PARTS, "total")}
    return memory, {name: cells[name] for name in ("all-gather", "reduce-scatter", "all-reduce") if name in cells}


def test_a_plan_simulates_without_data_and_devices(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--model.decoder.hidden_size=512", "--model.decoder.intermediate_size=1024", "--data.source", "none.txt",
               "--model.decoder.vocab_size=8000", "--model.decoder.num_hidden_layers=2", "--trainer.max_steps", "5",
               "--model.decoder.num_attention_heads=8", "--trainer.devices", "8", "--trainer.num_nodes", "4",
               "--trainer.precision", "bf16-mixed", "--data.context_length", "4096"]  # fmt: skip
    memory, collectives = simulated_plan(capsys, *options)
    assert memory["total"][1] == pytest.approx(memory["total"][0], rel=0.15)
    assert list(collectives) == ["all-reduce"]
    assert collectives["all-reduce"][0].strip() == "32"
    memory, collectives = simulated_plan(capsys, *options, "--trainer.strategy", "fsdp2")
    assert memory["total"][1] == pytest.approx(memory["total"][0], rel=0.15)
    assert list(collectives) == ["all-gather", "reduce-scatter"]
    gathers = ["--trainer.strategy", "FSDP2Strategy", "--trainer.strategy.context_parallel_size", "4",
               "--trainer.strategy.context_parallel_mode", "gather"]  # fmt: skip
    memory, _ = simulated_plan(capsys, *options, *gathers)
    assert memory["total"][1] == pytest.approx(memory["total"][0], rel=0.15)
    assert not torch.distributed.is_initialized()


RECIPES = {
    "376m": ["recipes/paper/pretrain.yaml"],
    "376m-32k": ["recipes/paper/pretrain.yaml", "recipes/paper/long.yaml"],
    "8b-64k": ["recipes/upcycle/llama-8b.yaml"],
    "8b-128k": ["recipes/upcycle/llama-8b.yaml", "recipes/upcycle/128k.yaml"],
    "quickstart": ["recipes/quickstart.yaml"],
    "laptop": ["recipes/laptop/pretrain.yaml"],
}


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 4, 128])
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_recipes_on_8_32_and_1024_devices(recipe, nodes, capsys):
    configs = [word for path in RECIPES[recipe] for word in ("--config", path)]
    started = time.process_time()
    memory, collectives = simulated_plan(capsys, *configs, "--trainer.devices", "8", "--trainer.num_nodes", str(nodes))
    assert memory["total"][1] == pytest.approx(memory["total"][0], rel=0.15)
    assert collectives
    assert time.process_time() - started < 90
