"""Checks that require multiple processes, run in one launch: `python on_ranks.py FOLDER RANKS CHECK…`.

Every rank writes the traceback of each check, or an empty string, to FOLDER/RANK.json.
"""

import json
import os
import sys
import traceback
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from ropepp_lit import sharded as shard_folders
from ropepp_lit.data.batch import Batch
from ropepp_lit.eval.models import Model
from ropepp_lit.eval.tasks.examples import write_answers
from ropepp_lit.nn import Decoder, DecoderConfig, Documents, FoPE, Frequencies, RoPEPP
from ropepp_lit.nn.attention import Attention
from ropepp_lit.nn.context_parallel import ContextGroup
from ropepp_lit.nn.generation import generate
from ropepp_lit.nn.sampling import Sampling
from ropepp_lit.text.tokenizer import byte_tokenizer
from ropepp_lit.train.build import build_decoder, load_weights
from ropepp_lit.train.fsdp import full_tensor
from ropepp_lit.train.loss_average import StepAverage
from ropepp_lit.train.optimizer import Muon, _ShardedMuon
from ropepp_lit.train.parallel import ParallelDims, set_gradient_reduction, shard_decoder

CPU = torch.device("cpu")
VOCABULARY, TOKENS = 64, 32


def make(scheme=None, **changes):
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 50,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return Decoder(DecoderConfig(**{**settings, **changes}), scheme or RoPEPP(), Frequencies())


def batch(number, rows=1):
    ids = torch.randint(0, VOCABULARY, (rows, TOKENS + 1), generator=torch.Generator().manual_seed(number))
    return ids[:, :-1], ids[:, 1:]


def sharded(dims, make=make, **options):
    return build_decoder(make, device=CPU, shard=partial(shard_decoder, dims=dims, **options))


def full(decoder):
    return {name: full_tensor(value) for name, value in decoder.state_dict().items()}


def first_weights(folder, dims):
    """Initial weights equal those of one process, with any default device and random state."""
    for change in ({}, {"tie_word_embeddings": True}, {"scheme": FoPE(context_length=64)}):
        torch.manual_seed(5)
        expected = make(**change).state_dict()
        torch.manual_seed(5)
        torch.rand(3)
        before = torch.get_rng_state()
        with torch.device("meta"):  # Lightning makes a GPU the default device
            one = build_decoder(partial(make, **change), device=CPU)
        distributed = sharded(dims, partial(make, **change))
        assert torch.equal(before, torch.get_rng_state())
        for decoder in (one, distributed):
            actual = full(decoder)
            assert actual.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(actual[name], value), (change, name)
        assert isinstance(distributed.model.embed_tokens, FSDPModule) == ("tie_word_embeddings" not in change)


def gradients(folder, dims):
    """Every reduction option gives the gradients of one process, with the expected collectives."""
    torch.set_default_dtype(torch.float64)
    replicas, micro_batches, layers = ParallelDims.create("cpu", replicate_size=2), 3, 2
    expected = {}
    for tied in (False, True):
        torch.manual_seed(0)
        one = make(tie_word_embeddings=tied)
        for number in range(micro_batches * dist.get_world_size()):
            (one.loss(*batch(number)) / dist.get_world_size()).backward()
        expected[tied] = [parameter.grad for parameter in one.parameters()]
    for ranks, each, reshards, tied in (
        (dims, True, True, False),
        (dims, False, True, False),
        (dims, True, False, False),
        (dims, False, False, True),
        (replicas, True, True, False),
        (replicas, False, True, False),
    ):
        torch.manual_seed(0)
        decoder = sharded(ranks, partial(make, tie_word_embeddings=tied), reshard_after_forward=reshards)
        counts = []
        for number in range(micro_batches):
            with CommDebugMode() as communication:
                loss = decoder.loss(*batch(number * dist.get_world_size() + dist.get_rank()))
                options = {"reduce_each_micro_batch": each, "reshard_after_forward": reshards}
                set_gradient_reduction(decoder, is_last=number == micro_batches - 1, **options)
                loss.backward()
            comm_counts = {str(kind): count for kind, count in communication.get_comm_counts().items()}
            counts.append(tuple(sum(n for kind, n in comm_counts.items() if word in kind) for word in
                                ("allgather", "reduce_scatter", "allreduce")))  # fmt: skip
            if number == 0 and reshards:
                is_kept = [isinstance(parameter.grad, DTensor) for parameter in decoder.parameters()]
                assert all(is_kept) if each and ranks is dims else not any(is_kept)
        for parameter, value in zip(decoder.parameters(), expected[tied], strict=True):
            torch.testing.assert_close(full_tensor(parameter.grad), value, atol=1e-12, rtol=0)
        groups = layers + (1 if tied else 3)  # the root, and separately embedding and output layer
        if ranks is replicas:  # all-reduced once per step
            assert [count[2] for count in counts] == [0, 0, groups], counts
        if ranks is replicas and dist.get_world_size() == 2:
            continue  # each rank holds all parameters
        # Embedding, output layer and root are gathered once, blocks twice if they are resharded.
        gathered = groups + (layers if reshards else 0)
        assert [count[0] for count in counts] == ([gathered] * 3 if reshards else [gathered, 0, 0]), counts
        assert [count[1] for count in counts] == ([groups] * 3 if each else [0, 0, groups]), counts


def marked_batch(rows, shard=None, *, weighs_documents):
    """Create rows of two conversations with few trained tokens; every third row has none in the second one."""
    batches = []
    for number in rows:
        generator = torch.Generator().manual_seed(number)
        ids, labels = batch(number)
        starts = torch.zeros(1, TOKENS, dtype=torch.bool)
        starts[0, 5 + number] = True
        is_trained = torch.rand(1, TOKENS, generator=generator) < 0.1 + 0.1 * number
        is_trained[0, 1], is_trained[0, 4 + number] = True, False
        is_trained[0, 5 + number :] &= number % 3 != 0
        batches.append((ids, labels.masked_fill(~is_trained, -100), starts))
    ids, labels, starts = (torch.cat(parts) for parts in zip(*batches, strict=True))
    documents = Documents.from_starts(starts)
    return Batch.create(ids, labels, documents, shard=shard, weighs_documents=weighs_documents)


def loss_averages(folder, dims):
    """Gradients of a step equal those of a mean over all rows, however these are distributed."""
    torch.set_default_dtype(torch.float64)
    ranks, rank, micro_batches = dist.get_world_size(), dist.get_rank(), 2
    context, copies = ParallelDims.create("cpu", context_parallel_size=2), ParallelDims.create("cpu", replicate_size=2)
    rows = list(range(micro_batches * ranks))
    for over in ("trained_tokens", "conversations"):
        torch.manual_seed(0)
        one = make()
        means = []  # reference: one conversation at a time
        for number in rows:
            marked = marked_batch([number], weighs_documents=False)
            losses = torch.nn.functional.cross_entropy(
                one(marked.input_ids, documents=marked.documents)[0], marked.labels[0], reduction="none"
            ).split(marked.documents.cu_seqlens.diff().tolist())
            counts = (marked.labels[0] != -100).split(marked.documents.cu_seqlens.diff().tolist())
            means += [loss[count] for loss, count in zip(losses, counts, strict=True) if count.any()]
        mean = torch.cat(means).mean() if over == "trained_tokens" else torch.stack([x.mean() for x in means]).mean()
        mean.backward()
        for where in ("ddp", dims, copies, context):
            torch.manual_seed(0)
            decoder = make() if where == "ddp" else sharded(where, make)
            module = nn.parallel.DistributedDataParallel(_Loss(decoder)) if where == "ddp" else None
            average, num_positions = StepAverage(over), 0
            for number in range(micro_batches):
                shard, own = None, [number * ranks + rank]
                if where is context:
                    shard, own = decoder.context_group.shard, [number * ranks + k for k in range(ranks)]
                marked = marked_batch(own, shard, weighs_documents=over == "conversations")
                average.add(marked)
                num_positions = marked.labels.numel()
                is_last = number == micro_batches - 1
                if module is not None:
                    with nullcontext() if is_last else module.no_sync():
                        (module(marked) / num_positions / micro_batches).backward()
                    continue
                set_gradient_reduction(
                    decoder, is_last=is_last, reduce_each_micro_batch=True, reshard_after_forward=True
                )
                (marked.loss(decoder) / num_positions / micro_batches).backward()
            trainer = SimpleNamespace(
                world_size=ranks, accumulate_grad_batches=micro_batches, strategy=SimpleNamespace(root_device=CPU)
            )
            average.rescale(decoder.parameters(), trainer, num_positions=num_positions)
            for parameter, other in zip(decoder.parameters(), one.parameters(), strict=True):
                # The weights of conversations are float32.
                torch.testing.assert_close(full_tensor(parameter.grad), other.grad, atol=1e-8, rtol=1e-7)
            (count,) = average.read_count(CPU)
            assert count == (len(torch.cat(means)) if over == "trained_tokens" else len(means))


class _Loss(nn.Module):
    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, marked):
        return marked.loss(self.decoder)


def dtypes(folder, dims):
    """Without autocast, hidden states are bfloat16, tables of a scheme are float32, and the loss agrees."""
    for scheme in (RoPEPP(), FoPE(context_length=64)):
        torch.manual_seed(0)
        one, distributed = make(scheme), sharded(dims, partial(make, scheme), mixed_dtype=torch.bfloat16)
        seen, attention = {}, F.scaled_dot_product_attention

        def attend(queries, keys, values, *arguments, seen=seen, attention=attention, **keywords):
            seen.setdefault("attention", set()).update(x.dtype for x in (queries, keys, values))
            return attention(queries, keys, values, *arguments, **keywords)

        def hook(module, arguments, seen=seen):
            seen.setdefault("hidden", set()).add(arguments[0].dtype)
            seen.setdefault("tables", set()).update(x.dtype for x in arguments[1])
            seen.setdefault("constants", set()).update(x.dtype for x in module.buffers())

        for module in distributed.modules():
            if isinstance(module, Attention):
                module.register_forward_pre_hook(hook)
        F.scaled_dot_product_attention = attend
        try:
            loss = distributed.loss(*batch(dist.get_rank()))
        finally:
            F.scaled_dot_product_attention = attention
        loss.backward()
        assert seen["attention"] == seen["hidden"] == {torch.bfloat16}, seen
        assert seen["tables"] == {torch.float32}, seen
        assert seen["constants"] <= {torch.float32}, seen
        assert {parameter.grad.dtype for parameter in distributed.parameters()} == {torch.float32}
        with torch.autocast("cpu", torch.bfloat16):
            other = one.loss(*batch(dist.get_rank()))
        torch.testing.assert_close(loss, other, atol=5e-3, rtol=0)


def shards(folder, dims):
    """A sharded decoder reads only its shards of the weights; an unsharded one reads all of them."""
    for tied in (False, True):
        torch.manual_seed(dist.get_world_size())
        path = Path(folder) / f"{tied}.ckpt"
        saved = sharded(dims, partial(make, tie_word_embeddings=tied))
        state = {f"decoder.{name}": value for name, value in saved.state_dict().items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            distributed_checkpoint.save({"state_dict": state}, checkpoint_id=path)
        (path / shard_folders.SHARDED_METADATA).touch()
        sizes, read_data = [], shard_folders._Reader.read_data

        def counted(self, plan, planner, sizes=sizes, read_data=read_data):
            sizes.append(sum(item.lengths.numel() for item in plan.items))
            return read_data(self, plan, planner)

        shard_folders._Reader.read_data = counted
        try:
            torch.manual_seed(99)
            others = [
                sharded(dims, partial(make, tie_word_embeddings=tied), mixed_dtype=torch.bfloat16),
                make(tie_word_embeddings=tied),
            ]
            for other in others:
                load_weights(other, str(path))
        finally:
            shard_folders._Reader.read_data = read_data
        for other in others:
            assert all(torch.equal(value, full(saved)[name]) for name, value in full(other).items())
        total = sum(value.numel() for value in others[1].state_dict().values())
        assert sizes[1] == total
        assert abs(sizes[0] / total - 1 / dist.get_world_size()) < 0.02


def muon(folder, dims):
    """Updates equal those of one process, with odd sizes and with more and fewer matrices than ranks."""
    world_size = dist.get_world_size()
    all_dims = [dims, *([ParallelDims.create("cpu", replicate_size=2)] if world_size % 2 == 0 else [])]
    shapes = [(7, 5), (5, 5), (5, 12), (1, 3), (7, 5), (2, 9), (16, 4)]
    for ranks in all_dims:
        for dtype in (torch.float32, torch.float64):
            torch.manual_seed(0)
            one, distributed = (
                nn.Sequential(*(nn.Linear(*shape, bias=False, dtype=dtype) for shape in shapes)) for _ in range(2)
            )
            distributed.load_state_dict(one.state_dict())
            fully_shard(distributed, mesh=ranks.mesh)
            settings = {"lr": 0.1, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
            optimizers = (
                torch.optim.Muon(one.parameters(), **settings),
                _ShardedMuon(distributed.parameters(), **settings),
            )
            for step in range(3):
                generator = torch.Generator().manual_seed(step)
                for a, b in zip(one.parameters(), distributed.parameters(), strict=True):
                    a.grad = torch.randn(a.shape, generator=generator, dtype=dtype)
                    b.grad = distribute_tensor(a.grad, b.device_mesh, b.placements)
                with CommDebugMode() as communication:
                    for optimizer in optimizers:
                        optimizer.step()
            for a, b in zip(one.parameters(), distributed.parameters(), strict=True):
                assert torch.equal(a, full_tensor(b)), (a - full_tensor(b)).abs().max()
            size = ranks.mesh.size(ranks.mesh.ndim - 1)
            rounds = -(-len(shapes) // size)
            counts = {str(kind): count for kind, count in communication.get_comm_counts().items()}
            exchanges = sum(count for kind, count in counts.items() if "alltoall" in kind)
            replicas = world_size // size
            own = len(range(dist.get_rank() // size, rounds, replicas))
            assert exchanges == 2 * own, counts
    decoder = sharded(dims)
    optimizer = Muon(lr=0.01).build(decoder)
    decoder.loss(*batch(0)).backward()
    optimizer.step()
    states = {id(parameter): state for parameter, state in optimizer.state.items()}
    assert len(states) == len(list(decoder.parameters()))


def ranks_and_meshes(folder, dims):
    """Dimensions of parallelism; creating them emits no deprecation warning."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        context = ParallelDims.create("cpu", context_parallel_size=2)
        copies = ParallelDims.create("cpu", replicate_size=2)
        shard_decoder(make(), copies)
        decoder = sharded(context)
    assert (dims.replica, dims.num_replicas) == (rank, world_size)
    assert (context.replica, context.num_replicas) == (rank // 2, world_size // 2)
    assert dist.get_process_group_ranks(context.context_group) == [rank // 2 * 2, rank // 2 * 2 + 1]
    assert decoder.context_group == ContextGroup(context.context_group, "gather")
    assert copies.mesh.mesh_dim_names == ("replicate", "fsdp")
    assert copies.mesh.shape == (2, world_size // 2)
    assert (copies.replica, copies.num_replicas) == (rank, world_size)


def generation(folder, dims):
    """Ranks with different logits generate rank 0's tokens, and stop when rank 0 does."""
    tokenizer, replicas = byte_tokenizer(), ParallelDims.create("cpu", replicate_size=2)
    prompts, eos = [[5, 6, 7], [8, 9, 10]], tokenizer.eos_token_id
    for ranks in (dims, replicas):
        decoder, calls = sharded(ranks), []

        def differ(module, inputs, logits, calls=calls):
            calls.append(None)
            logits[..., eos if dist.get_rank() or len(calls) > 3 else 10 + len(calls)] += 1e4

        decoder.lm_head.register_forward_hook(differ)
        model = Model(name="", path="", decoder=decoder, tokenizer=tokenizer, fingerprint="")
        results = [write_answers(model, prompts, max_new_tokens=20), len(calls)]
        calls.clear()
        tokens = generate(decoder, torch.tensor(prompts), max_new_tokens=5, sampling=Sampling(temperature=1.0))
        results.append(torch.stack(list(tokens), dim=1).tolist())
        expected = [results]
        dist.broadcast_object_list(expected, src=0)
        assert results == expected[0]
        assert results[1:] == [4, [[11, 12, 13, eos, eos]] * 2], results
        decoder.loss(*batch(0)).backward()  # training still works afterwards


def main(rank, folder, world_size, names):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    dims, failures = ParallelDims.create("cpu"), {}
    for name in names:
        try:
            globals()[name](folder, dims)
            failures[name] = ""
        except Exception:  # report the failure of every check
            failures[name] = traceback.format_exc()
        torch.set_default_dtype(torch.float32)
        dist.barrier()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(failures))
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder, world_size, *names = sys.argv[1:]
    mp.start_processes(main, (folder, int(world_size), names), nprocs=int(world_size), start_method="fork")
