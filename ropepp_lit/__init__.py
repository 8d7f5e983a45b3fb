"""ropepp-lit: train language models with RoPE++ (arXiv 2512.07525)."""

__version__ = "0.1.0"
