"""Text generation: prompts from files, conversations, and an OpenAI-compatible server."""
