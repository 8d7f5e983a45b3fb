"""The decoder in float64 against a plain implementation of the paper's complex formula, at large positions."""

import math

import pytest
import torch

from ropepp_lit.nn import Decoder, DecoderConfig, Frequencies, Linear, RoPE, RoPEPP

CONFIG = DecoderConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
    initializer_range=0.3,
)
SCHEMES = {"rope": RoPE(), "eh": RoPEPP(variant="eh"), "ec": RoPEPP(variant="ec")}


def reference_logits(decoder, input_ids, positions, variant):
    """Compute one row [T] head by head from z(t, s) = Σ q_n · conj(k_n) · exp(iθ_n(s - t))."""
    weights = dict(decoder.state_dict())
    config, d = decoder.config, decoder.config.head_dim
    theta = decoder.frequencies.rope_theta ** (-2 * torch.arange(d // 2, dtype=torch.float64) / d)
    theta = theta / getattr(decoder.frequencies, "factor", 1)
    num_tokens = len(input_ids)

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[f"{name}.weight"]

    def heads(x):
        # The paper's sign (s - t) goes with x_n - i·x_{n+d/2}: with it Re z and -Im z are the rotations R_t, R_s.
        pairs = x.view(num_tokens, -1, 2, d // 2)
        return torch.complex(pairs[:, :, 0], -pairs[:, :, 1])

    hidden = weights["model.embed_tokens.weight"][input_ids]
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        x = norm(hidden, f"{name}.input_layernorm")
        q, k = heads(linear(x, f"{name}.self_attn.q_proj")), heads(linear(x, f"{name}.self_attn.k_proj"))
        v = linear(x, f"{name}.self_attn.v_proj").view(num_tokens, -1, d)
        group = q.shape[1] // k.shape[1]
        outputs = []
        for head in range(q.shape[1]):
            distance = (positions[None, :] - positions[:, None]).double()  # s - t
            turn = torch.exp(1j * distance[..., None] * theta)
            z = torch.einsum("tn,sn,tsn->ts", q[:, head], k[:, head // group].conj(), turn)
            for score in [z.real] if variant == "rope" else [z.real, -z.imag]:
                score = (score / math.sqrt(d)).masked_fill(torch.ones_like(score).triu(1).bool(), -math.inf)
                outputs.append(score.softmax(-1) @ v[:, head // group])
        hidden = hidden + linear(torch.cat(outputs, -1), f"{name}.self_attn.o_proj")
        x = norm(hidden, f"{name}.post_attention_layernorm")
        gate = linear(x, f"{name}.mlp.gate_proj")
        up = linear(x, f"{name}.mlp.up_proj")
        hidden = hidden + linear(gate * torch.sigmoid(gate) * up, f"{name}.mlp.down_proj")
    return linear(norm(hidden, "model.norm"), "lm_head")


def make_decoder(variant, frequencies):
    torch.manual_seed(0)
    decoder = Decoder(CONFIG, SCHEMES[variant], frequencies).double()
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.3)
    return decoder


@pytest.mark.parametrize("variant", SCHEMES)
@pytest.mark.parametrize("frequencies", [Frequencies(), Frequencies(rope_theta=500_000), Linear(factor=8)], ids=str)
def test_complex_formula_at_positions_up_to_100_000(variant, frequencies):
    decoder = make_decoder(variant, frequencies)
    positions = torch.tensor([0, 1, 2, 3, 500, 4095, 4096, 32_767, 65_536, 99_999, 100_000])
    input_ids = torch.randint(0, CONFIG.vocab_size, (len(positions),))
    actual = decoder(input_ids[None], positions=positions[None])[0]
    expected = reference_logits(decoder, input_ids, positions, variant)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("variant", SCHEMES)
def test_cached_steps_equal_one_forward(variant):
    decoder = make_decoder(variant, Frequencies())
    input_ids = torch.randint(0, CONFIG.vocab_size, (2, 20))
    whole = decoder(input_ids)
    cache = decoder.allocate_cache(batch_size=2, max_tokens=20)
    parts = [decoder(part, cache=cache) for part in input_ids.split([7, 1, 5, 1, 6], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-12, rtol=0)


def test_eh_is_ec_of_half_the_heads():
    half = DecoderConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    full = DecoderConfig(**{**half.to_dict(), "num_attention_heads": 4, "num_key_value_heads": 2})
    ec, eh = Decoder(half, RoPEPP(variant="ec"), Frequencies()), Decoder(full, RoPEPP(variant="eh"), Frequencies())
    eh.load_state_dict(ec.state_dict())
    input_ids = torch.randint(0, 64, (2, 30))
    assert torch.equal(ec(input_ids), eh(input_ids))
