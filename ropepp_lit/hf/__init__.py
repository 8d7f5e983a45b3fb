"""Hugging Face folders in and out, and RoPE checkpoints turned into RoPE++ ones."""
