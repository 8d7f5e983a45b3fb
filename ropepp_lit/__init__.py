"""ropepp-lit: train language models with RoPE++ (arXiv 2512.07525).

The names in `__all__` are the Python API; README.md in this folder has an example of each. They are imported on first
use, so that `import ropepp_lit` and the command's help need no PyTorch.
"""

TYPE_CHECKING = False  # as in typing, which `python -m ropepp_lit` could import from the current folder here
if TYPE_CHECKING:
    from ropepp_lit.commands.convert import export, import_, upcycle
    from ropepp_lit.commands.evaluate import evaluate
    from ropepp_lit.commands.prepare import prepare
    from ropepp_lit.data.token_data import TokenData
    from ropepp_lit.errors import UsageError
    from ropepp_lit.inference.completion import Completion, complete
    from ropepp_lit.inference.model import GenerationSettings, Model, load_model
    from ropepp_lit.nn import Decoder, DecoderConfig, Frequencies, PositionScheme, RoPE, RoPEPP
    from ropepp_lit.nn.sampling import Sampling
    from ropepp_lit.train.causal_lm import CausalLM
    from ropepp_lit.train.optimizer import AdamW, Muon
    from ropepp_lit.train.schedule import Constant, Cosine, WarmupStableDecay

__version__ = "0.1.0"

_MODULES = {
    "commands.convert": ("export", "import_", "upcycle"),
    "commands.evaluate": ("evaluate",),
    "commands.prepare": ("prepare",),
    "data.token_data": ("TokenData",),
    "errors": ("UsageError",),
    "inference.completion": ("Completion", "complete"),
    "inference.model": ("GenerationSettings", "Model", "load_model"),
    "nn": ("Decoder", "DecoderConfig", "Frequencies", "PositionScheme", "RoPE", "RoPEPP"),
    "nn.sampling": ("Sampling",),
    "train.causal_lm": ("CausalLM",),
    "train.optimizer": ("AdamW", "Muon"),
    "train.schedule": ("Constant", "Cosine", "WarmupStableDecay"),
}
"""Names of the API by the module that defines them."""

__all__ = [
    "AdamW",
    "CausalLM",
    "Completion",
    "Constant",
    "Cosine",
    "Decoder",
    "DecoderConfig",
    "Frequencies",
    "GenerationSettings",
    "Model",
    "Muon",
    "PositionScheme",
    "RoPE",
    "RoPEPP",
    "Sampling",
    "TokenData",
    "UsageError",
    "WarmupStableDecay",
    "complete",
    "evaluate",
    "export",
    "import_",
    "load_model",
    "prepare",
    "upcycle",
]


def __getattr__(name: str) -> object:
    """Import a name of the API on first use (PEP 562)."""
    import importlib

    for module, names in _MODULES.items():
        if name in names:
            value = getattr(importlib.import_module(f"ropepp_lit.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
