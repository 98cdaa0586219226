"""Models of other sizes than the recorded one for the exporters' tests."""

import json

import pytest
from sessions import DATA


@pytest.fixture(scope="session")
def grouped():
    """Two query heads for each key head, tied embeddings, other depths."""
    return other_sizes(num_key_value_heads=2, num_hidden_layers=2, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def narrow():
    """Heads of 12: GroupQueryAttention does not take them."""
    return other_sizes(hidden_size=48, num_hidden_layers=1)


def other_sizes(**sizes):
    """The recorded config with other sizes and random weights, optimized."""
    from mmopt.frontend.load import from_config
    from mmopt.frontend.trace import trace
    from mmopt.search.optimize import optimize

    raw = json.loads((DATA / "config.json").read_text())
    raw |= {"num_attention_heads": 4, **sizes}
    return optimize(trace(from_config(raw, random=True), batch=3, images=2, context=64), check=False).program
