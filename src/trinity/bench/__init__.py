"""Measurements of a model on this machine, beside other engines where they are installed."""
