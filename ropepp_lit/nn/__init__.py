"""Decoders with RoPE, RoPE++ and other position schemes in plain PyTorch, without Lightning, data or files.

Read `positions.py`, `attention.py`, `block.py`, `decoder.py` and `loss.py`, in this order.
"""

from ropepp_lit.nn.baselines import ALiBi, FoPE, NoPE, PartialRoPE, RNoPE
from ropepp_lit.nn.config import DecoderConfig
from ropepp_lit.nn.controls import IndependentQueries, MappedQueries, TurnedQueries, UnrotatedQueries
from ropepp_lit.nn.decoder import Decoder
from ropepp_lit.nn.documents import Documents
from ropepp_lit.nn.frequencies import Clipped, Frequencies, Linear, Llama3, Yarn, YarnByRotations
from ropepp_lit.nn.pope import PoPE
from ropepp_lit.nn.positions import HeadLayout, PositionScheme, RoPE, RoPEPP, layout_of
from ropepp_lit.nn.probe import Probe

__all__ = [
    "ALiBi",
    "Clipped",
    "Decoder",
    "DecoderConfig",
    "Documents",
    "FoPE",
    "Frequencies",
    "HeadLayout",
    "IndependentQueries",
    "Linear",
    "Llama3",
    "MappedQueries",
    "NoPE",
    "PartialRoPE",
    "PoPE",
    "PositionScheme",
    "Probe",
    "RNoPE",
    "RoPE",
    "RoPEPP",
    "TurnedQueries",
    "UnrotatedQueries",
    "Yarn",
    "YarnByRotations",
    "layout_of",
]
