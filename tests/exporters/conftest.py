"""A second model for the exporters' tests, of other sizes than the recorded one."""

import json

import pytest
from sessions import DATA


@pytest.fixture(scope="session")
def grouped():
    """Two query heads for each key head, tied embeddings, other depths, random weights; optimized."""
    from mmopt.checkpoint import from_config
    from mmopt.pipeline import optimize
    from mmopt.tracing import trace

    raw = json.loads((DATA / "config.json").read_text())
    raw |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "tie_word_embeddings": True}
    return optimize(trace(from_config(raw, random=True), batch=3, images=2, context=64), check=False).program
