"""Floor 5: the OpenAI-compatible server."""
