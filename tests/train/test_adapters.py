"""LoRA on the decoder: trained weights, checkpoints, and equal outputs merged, in peft and in transformers."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from ropepp_lit.checkpoint import KEY, describe_architecture, load_decoder, make_checkpoint, write_checkpoint
from ropepp_lit.errors import UsageError
from ropepp_lit.hf.adapters import fingerprint, write_peft
from ropepp_lit.hf.export import export
from ropepp_lit.hf.folder import open_checkpoint
from ropepp_lit.nn import ALiBi, Decoder, DecoderConfig, FoPE, Frequencies, RoPE, RoPEPP
from ropepp_lit.nn.lora import LINEAR, LoRA, inject, trained_names
from ropepp_lit.train.build import build_decoder
from ropepp_lit.train.lora import adapter_entry, trained_weights
from ropepp_lit.train.optimizer import AdamW

IDS = torch.randint(64, (2, 25), generator=torch.Generator().manual_seed(0))


def make(scheme, **changes):
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return Decoder(DecoderConfig(**settings, **changes), scheme, Frequencies())


def write_base(path, scheme, *, dtype=torch.float32, **changes):
    torch.manual_seed(3)
    decoder = make(scheme, **changes).to(dtype)
    architecture = describe_architecture(decoder.config, decoder.scheme, decoder.frequencies)
    write_checkpoint(path, make_checkpoint(decoder.state_dict(), architecture=architecture, context_length=32))
    return path


def train(base, scheme, lora, *, steps=3, changes=None, **options):
    """Train a decoder with adapters for some steps; returns it and its outputs before the first step."""
    torch.manual_seed(1)
    decoder = build_decoder(
        partial(make, scheme, **(changes or {})), device=torch.device("cpu"), init_from=str(base), lora=lora, **options
    )
    with torch.no_grad():
        before = decoder.eval()(IDS)
    optimizer = AdamW(lr=1e-2).build(decoder.train())
    for step in range(steps):
        torch.manual_seed(step)
        decoder.loss(IDS[:, :-1], IDS[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return decoder.eval(), before


def write_adapter(path, decoder, lora, base):
    """Write a checkpoint of adapters as a run does."""
    module = torch.nn.Module()
    module.decoder = decoder
    checkpoint = make_checkpoint(
        {}, architecture=describe_architecture(decoder.config, decoder.scheme, decoder.frequencies), context_length=32
    )
    checkpoint["state_dict"] = trained_weights(module, module.state_dict())
    checkpoint[KEY]["adapter"] = adapter_entry(lora, str(base), None)
    write_checkpoint(path, checkpoint)
    return path


EC = RoPEPP(variant="ec")
ALL = ["imaginary", "embed_tokens", "lm_head", "norms"]
# Scheme, geometry, settings of LoRA.
CASES = {
    "ec": (EC, {}, {}),
    "ec-tied": (EC, {"tie_word_embeddings": True}, {"dora": True}),
    "ec-imaginary": (EC, {"attention_output_bias": True}, {"train_fully": ["imaginary"]}),
    "ec-only-imaginary": (EC, {}, {"targets": [], "train_fully": ["imaginary"]}),
    "ec-all-tied": (EC, {"tie_word_embeddings": True, "qk_norm": True}, {"train_fully": ALL}),
    "eh": (RoPEPP(variant="eh"), {}, {"targets": ["q_proj", "o_proj"], "rslora": True}),
    "eh-tied": (RoPEPP(variant="eh"), {"tie_word_embeddings": True}, {"train_fully": ["imaginary", "embed_tokens"]}),
    "rope": (
        RoPE(),
        {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
        {"alpha": 8, "dropout": 0.2},
    ),
    "rope-tied": (RoPE(), {"tie_word_embeddings": True}, {"targets": ["down_proj"], "train_fully": ["norms"]}),
    "rope-dora": (RoPE(), {}, {"dora": True, "rslora": True}),
    "alibi": (ALiBi(), {}, {"train_fully": ["lm_head"]}),
    "fope": (FoPE(context_length=32), {}, {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def trained(folder):
    """Base, adapters, trained decoder and its initial outputs, for each case."""
    cases = {}
    for name, (scheme, changes, settings) in CASES.items():
        base, lora = write_base(folder / f"{name}-base.ckpt", scheme, **changes), LoRA(rank=4, **settings)
        decoder, before = train(base, scheme, lora, changes=changes)
        cases[name] = base, write_adapter(folder / f"{name}.ckpt", decoder, lora, base), decoder, before
    return cases


@pytest.mark.parametrize("case", list(CASES))
def test_starts_equal_to_its_base_trains_and_merges(trained, case):
    base, path, decoder, before = trained[case]
    with torch.no_grad():
        assert torch.equal(before, load_decoder(open_checkpoint(base))(IDS))
        after = decoder(IDS)
        assert (after - before).abs().max() > 1e-3
        merged = load_decoder(open_checkpoint(path))
        torch.testing.assert_close(merged(IDS), after, atol=1e-5, rtol=0)
    if decoder.config.tie_word_embeddings:
        assert merged.lm_head.weight is merged.model.embed_tokens.weight


@pytest.mark.parametrize("case", list(CASES))
def test_a_checkpoint_stores_trained_weights_by_plain_names(trained, case):
    _, path, decoder, _ = trained[case]
    stored = torch.load(path, weights_only=True)
    scheme, changes, settings = CASES[case]
    expected = {
        f"decoder.model.layers.{layer}.{'mlp' if name in LINEAR[4:] else 'self_attn'}.{name}.{part}.weight"
        for layer in range(2)
        for name in settings.get("targets", LINEAR)
        for part in ("lora_A", "lora_B", *(["lora_magnitude_vector"] if settings.get("dora") else []))
    }
    fully = settings.get("train_fully", [])
    if "imaginary" in fully:
        expected |= {f"decoder.model.layers.{layer}.self_attn.o_proj.imaginary" for layer in range(2)}
    plain = make(scheme, **changes)
    expected |= {f"decoder.{name}" for name, _ in plain.named_parameters() if "norm" in name and "norms" in fully}
    if "embed_tokens" in fully:
        expected.add("decoder.model.embed_tokens.weight")
    if "lm_head" in fully and not plain.config.tie_word_embeddings:
        expected.add("decoder.lm_head.weight")
    assert stored["state_dict"].keys() == expected
    assert all(value.dtype == torch.float32 for value in stored["state_dict"].values())
    optimizer = AdamW(lr=1e-2).build(decoder)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(expected)


PEFT = """
import json, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ropepp_lit":
            raise ImportError("adapters must not need ropepp_lit")

sys.meta_path.insert(0, Hidden())
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

folder, cases = sys.argv[1], json.loads(sys.argv[2])
ids = torch.tensor(json.loads(sys.argv[3]))
outputs = {}
with torch.no_grad():
    for case, has_adapter in cases.items():
        def load(kind):
            path = f"{folder}/{case}-{kind}"
            return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=torch.float32).eval()
        outputs[f"{case} merged"] = load("merged")(ids).logits
        if has_adapter:
            model = PeftModel.from_pretrained(load("base"), f"{folder}/{case}-peft").eval()
            outputs[f"{case} peft"] = model(ids).logits
save_file(outputs, f"{folder}/answers.safetensors")
"""


def test_merged_and_peft_outputs_are_equal(trained, folder, run_file):
    """In a process without ropepp_lit, with trained tied embeddings."""
    cases = {}
    for case in ("ec", "ec-tied", "ec-imaginary", "ec-all-tied", "eh", "eh-tied", "rope", "rope-tied", "rope-dora"):
        base, path, *_ = trained[case]
        write = partial(export, dtype=None, max_shard_bytes=10**9, check=False)
        write(open_checkpoint(path), folder / f"{case}-merged")
        cases[case] = not CASES[case][2].get("train_fully")
        if not cases[case]:
            with pytest.raises(UsageError, match=r"which peft's LoRA format does not support; .* ropepp-lit export"):
                write_peft(torch.load(path, weights_only=True), path, folder / f"{case}-peft")
            continue
        write(open_checkpoint(base), folder / f"{case}-base")
        write_peft(torch.load(path, weights_only=True), path, folder / f"{case}-peft")
        assert {file.name for file in (folder / f"{case}-peft").iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
    (folder / "load.py").write_text(PEFT)
    run_file(folder / "load.py", folder, json.dumps(cases), json.dumps(IDS.tolist()), cwd=folder)
    answers = load_file(folder / "answers.safetensors")
    for case, has_adapter in cases.items():
        with torch.no_grad():
            native = trained[case][2](IDS)
            again = load_decoder(open_checkpoint(folder / f"{case}-merged"))(IDS)
        torch.testing.assert_close(answers[f"{case} merged"], native, atol=1e-5, rtol=0, msg=case)
        torch.testing.assert_close(again, native, atol=1e-5, rtol=0, msg=case)
        if has_adapter:
            torch.testing.assert_close(answers[f"{case} peft"], native, atol=1e-5, rtol=0, msg=case)
    assert fingerprint(open_checkpoint(folder / "ec-base")) == fingerprint(open_checkpoint(trained["ec"][0]))


@pytest.mark.parametrize(
    "options",
    [{"activation_checkpointing": 1}, {"activation_checkpointing": "attention"}, {"mlp_chunk_tokens": 7}],
    ids=str,
)
@pytest.mark.parametrize("base_dtype", [None, "bfloat16"])
def test_memory_options_give_the_same_gradients(trained, options, base_dtype):
    """With recomputed blocks, the same dropout, and embeddings without gradients."""
    dropout = 0.0 if "mlp_chunk_tokens" in options else 0.3
    lora = LoRA(rank=4, dropout=dropout, base_dtype=base_dtype, train_fully=["imaginary"])
    plain, other = (train(trained["ec"][0], EC, lora, steps=0, **settings)[0].train() for settings in ({}, options))
    for decoder in (plain, other):
        for name, parameter in decoder.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(5))
        torch.manual_seed(0)
        decoder.loss(IDS[:, :-1], IDS[:, 1:]).backward()
    others = dict(other.named_parameters())
    for name, parameter in plain.named_parameters():
        assert (parameter.grad is None) != parameter.requires_grad
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32
            tolerance = 1e-6 if base_dtype is None else 1e-3
            torch.testing.assert_close(others[name].grad, parameter.grad, atol=tolerance, rtol=1e-4, msg=name)


def test_float32_adapters_train_over_a_bfloat16_base(trained, folder):
    """Also with float32 embeddings and norms; the merged model is rounded to bfloat16 once."""
    for fully in ([], ALL):
        lora = LoRA(rank=4, base_dtype="bfloat16", train_fully=fully)
        changes = {"tie_word_embeddings": bool(fully)}
        base = write_base(folder / f"half-{len(fully)}.ckpt", EC, dtype=torch.bfloat16, **changes)
        decoder, before = train(base, EC, lora, steps=8, changes=changes)
        with torch.no_grad():
            half = load_decoder(open_checkpoint(base))
            assert torch.equal(before.bfloat16(), half(IDS))
            first, last = (float(x.loss(IDS[:, :-1], IDS[:, 1:])) for x in (half, decoder))
            assert last < first - 0.05
            path = write_adapter(folder / f"half-{len(fully)}-lora.ckpt", decoder, lora, base)
            merged = load_decoder(open_checkpoint(path))
            assert {value.dtype for value in merged.parameters()} == {torch.bfloat16}
            assert float(merged.loss(IDS[:, :-1], IDS[:, 1:])) == pytest.approx(last, abs=0.02)


def test_compiled_blocks_have_the_same_gradients(trained):
    lora = LoRA(rank=4, train_fully=["imaginary"])
    plain, compiled = (train(trained["ec"][0], EC, lora, steps=0)[0].train() for _ in range(2))
    for block in compiled.model.layers:
        block.compile(backend="aot_eager")
    for decoder in (plain, compiled):
        decoder.loss(IDS[:, :-1], IDS[:, 1:]).backward()
    assert trained_names(compiled) == trained_names(plain)
    others = dict(compiled.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(others[name].grad, parameter.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_initialization_depends_only_on_the_seed(trained):
    """With any default device and random state; the random state of the run is preserved."""
    drawn = []
    for count in (0, 7):
        torch.manual_seed(11)
        torch.rand(count)
        before = torch.get_rng_state()
        with torch.device("meta"):
            decoder = build_decoder(
                partial(make, EC), device=torch.device("cpu"), init_from=str(trained["ec"][0]), lora=LoRA(rank=4)
            )
        assert torch.equal(torch.get_rng_state(), before)
        drawn.append(decoder.state_dict())
    assert all(torch.equal(value, drawn[1][name]) for name, value in drawn[0].items())
    first = [value for name, value in drawn[0].items() if "lora_A" in name]
    assert len({float(value[0, 0]) for value in first}) == len(first)


def test_adapters_of_a_different_or_missing_base(trained, folder):
    base, path, *_ = trained["ec"]
    assert fingerprint(open_checkpoint(base)) == fingerprint(open_checkpoint(base))
    other = write_base(folder / "other.ckpt", EC, attention_output_bias=True)
    with pytest.raises(UsageError, match="trained on another base"):
        open_checkpoint(path, base=str(other))
    with pytest.raises(UsageError, match="stores a full model; a base applies only to adapters"):
        open_checkpoint(base, base=str(other))
    stored = torch.load(path, weights_only=True)
    for name, change in {
        "no layer": {"decoder.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(4, 32)},
        "shape": {"decoder.model.layers.0.mlp.up_proj.lora_A.weight": torch.zeros(3, 32)},
        "half": {"decoder.model.layers.0.mlp.up_proj.lora_A.weight": None},
        "nan": {"decoder.model.layers.0.mlp.up_proj.lora_B.weight": torch.full((48, 4), torch.nan)},
        "nothing": dict.fromkeys(stored["state_dict"]),
    }.items():
        state = {key: value for key, value in {**stored["state_dict"], **change}.items() if value is not None}
        write_checkpoint(folder / f"{name}.ckpt", {**stored, "state_dict": state})
        with pytest.raises(UsageError, match=r"does not match any weight|cannot be merged|it stores no adapters"):
            open_checkpoint(folder / f"{name}.ckpt")


def test_adapters_over_a_merged_model(trained, folder):
    """The base can be a checkpoint of adapters."""
    _, path, decoder, _ = trained["ec"]
    second, _ = train(path, EC, LoRA(rank=2))
    merged = load_decoder(open_checkpoint(write_adapter(folder / "second.ckpt", second, LoRA(rank=2), path)))
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS), second(IDS), atol=1e-5, rtol=0)
        assert (merged(IDS) - decoder(IDS)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "model.lora.rank: 0 must be 1 or more"),
        ({"alpha": 0}, "model.lora.alpha"),
        ({"dropout": 1}, "model.lora.dropout"),
        ({"targets": ["qkv_proj"]}, r"model.lora.targets: the decoder has no 'qkv_proj'; choose from q_proj"),
        ({"train_fully": ["wte"]}, "model.lora.train_fully: the decoder has no 'wte'"),
        ({"train_fully": ["imaginary"]}, "RoPE has no imaginary heads"),
        ({"targets": []}, "nothing to train"),
        ({"base_dtype": "int8"}, "model.lora.base_dtype"),
    ],
)
def test_invalid_settings(settings, message):
    with torch.device("meta"), pytest.raises(UsageError, match=message):
        inject(make(RoPE()), LoRA(**settings))
