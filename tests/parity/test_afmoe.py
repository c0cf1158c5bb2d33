"""Our model against transformers' AfmoeForCausalLM: the same weights, the same logits, gradients and continuations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

