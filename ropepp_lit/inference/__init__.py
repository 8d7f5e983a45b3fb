"""Writing text with a model: prompts from a file, and conversations."""
