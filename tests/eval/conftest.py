import pytest
import torch

from ropepp_lit.checkpoint import describe_architecture, make_checkpoint, write_checkpoint
from ropepp_lit.data.tokenizer import byte_tokenizer
from ropepp_lit.nn import Decoder, DecoderConfig, Frequencies, RoPE, RoPEPP

SCHEMES = {"rope": RoPE(), "eh": RoPEPP(variant="eh"), "ec": RoPEPP(variant="ec")}


@pytest.fixture(scope="session")
def small_checkpoints(tmp_path_factory):
    """Checkpoints of random models that read bytes, by variant."""
    folder, paths = tmp_path_factory.mktemp("models"), {}
    tokenizer = byte_tokenizer()
    config = DecoderConfig(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    for name, scheme in SCHEMES.items():
        torch.manual_seed(0)
        decoder = Decoder(config, scheme, Frequencies())
        paths[name] = folder / f"{name}.ckpt"
        write_checkpoint(
            paths[name],
            make_checkpoint(
                decoder.state_dict(),
                architecture=describe_architecture(config, scheme, Frequencies()),
                context_length=64,
                tokenizer=tokenizer.tokenizer.to_str(),
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            ),
        )
    return paths


@pytest.fixture(scope="session")
def documents():
    """Texts of different lengths, one of a single character, one with letters beyond ASCII."""
    return ["x", "A short text.", "Größe über alles: ä, ö, ü. " * 5, " ".join(str(n * n) for n in range(150))]
