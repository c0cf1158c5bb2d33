"""Rewriting documents with a language model: prompts, segments, gates, and a run that can be killed and resumed."""
