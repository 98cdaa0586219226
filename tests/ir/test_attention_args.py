"""Views of the arguments of attention operators."""

import pytest
import torch
from torch.fx import Graph

from mmopt.ir.attention_args import Attention, CachedAttention, CrossAttention, SegmentAttention, given, softmax_scale
from mmopt.ir.graph import ATTENTION, CACHED_ATTENTION, CROSS_ATTENTION, SEGMENT_ATTENTION

VIEWS = {
    ATTENTION: Attention,
    CACHED_ATTENTION: CachedAttention,
    CROSS_ATTENTION: CrossAttention,
    SEGMENT_ATTENTION: SegmentAttention,
}


@pytest.mark.parametrize(("op", "view"), VIEWS.items())
def test_names_order_and_defaults_are_those_of_the_schema(op, view):
    schema = op._schema.arguments
    assert list(view._fields) == [a.name for a in schema]
    assert view._field_defaults == {a.name: a.default_value for a in schema if a.has_default_value()}


@pytest.mark.parametrize(("op", "view"), VIEWS.items())
def test_of_a_node(op, view):
    graph = Graph()
    required = [a.name for a in op._schema.arguments if not a.has_default_value()]
    node = graph.call_function(op, tuple(graph.placeholder(name) for name in required))
    seen = view.of(node)
    assert [str(getattr(seen, name)) for name in required] == required
    assert seen == view(*node.args)
    assert given(seen._replace(scale=None)) == node.args or view is Attention  # its `causal` is no None
    assert given(seen._replace(scale=0.5))[-1] == 0.5


def test_the_mask_over_slots_is_last():
    assert CachedAttention._fields[-1] == "key_mask"  # `drop_hidden_rows` cuts it off


def test_scale():
    q = Graph().placeholder("q")
    q.meta["shape"] = (1, 3, 32)
    a = Attention(q, q, q, 2, 2)
    assert softmax_scale(a) == 0.25
    assert softmax_scale(a._replace(scale=1)) == 1.0
    assert isinstance(softmax_scale(a._replace(scale=1)), float)


def test_plain_values_only_at_the_end_are_left_out():
    a = CachedAttention(*range(8), key_mask=torch.tensor(True))
    assert given(a) == (*range(8), None, None, a.key_mask)
    assert given(a._replace(key_mask=None)) == tuple(range(8))
