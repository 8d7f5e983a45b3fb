"""Conversion of checkpoints from and to Hugging Face and GGUF formats, and upcycling of RoPE checkpoints to RoPE++."""
