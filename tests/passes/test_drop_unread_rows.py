"""Rows that nobody reads are not computed."""

import pytest
import torch
from toys import (
    DTYPES,
    VISUAL_AND_TEXT,
    D,
    Function,
    Rows,
    before_and_after,
    caught,
    chat,
    linear,
    ops_of,
    same,
    single,
    twice,
    unchanged,
)

from mmopt.ir.graph import shape_of
from mmopt.passes import drop_unread_rows
from mmopt.passes.drop_unread_rows import DropUnreadRows

X = {"x": ("B", "nt", D)}


def test_the_last_row_alone_goes_on_behind_the_attention(snapshot):
    before = chat(Rows())
    after, report = DropUnreadRows()(before)
    snapshot("drop_unread_rows", before_and_after(before, after, "language_model"))
    snapshot("drop_unread_rows_reader", before_and_after(before, after, "next_token"))
    assert len(report.rewrites) == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_numbers(dtype):
    before = chat(Rows(), dtype=dtype)
    same(before, DropUnreadRows()(before)[0], stage="language_model")


def test_a_slice_moves_up_inside_a_stage():
    cut = single(Function(lambda m, x: torch.tanh(m.a(x) * 2)[:, -1:], a=linear()), X)
    after, report = DropUnreadRows()(cut)
    assert ops_of(after) == ["slice", "linear", "mul", "tanh"]
    assert "3 operators work on the rows that are read alone" in report.rewrites[0]
    same(cut, after)


def test_a_slice_moves_up_along_any_dimension():
    cut = single(Function(lambda m, x: m.a(x).view(-1, x.shape[1], 2, D // 2).transpose(1, 2)[:, 1:], a=linear()), X)
    after, _ = DropUnreadRows()(cut)
    assert ops_of(after) == ["linear", "reshape", "slice", "permute"]
    same(cut, after)


def test_a_slice_moves_up_to_each_part_of_a_concatenation():
    both = Function(lambda m, x: torch.cat([m.a(x), m.b(x)], 2)[:, -1:], a=linear(), b=linear())
    cut = single(both, X)
    after, _ = DropUnreadRows()(cut)
    assert [shape_of(n)[1] for n in after.stages["toy"].graph.nodes if n.op == "call_function"] == [1, 1, 1, 1]
    same(cut, after)


def mixes_rows():
    return single(Function(lambda m, x: torch.softmax(m.a(x), 1)[:, -1:], a=linear()), X)


def read_twice():
    def run(m, x):
        y = m.a(x)
        return torch.tanh(y)[:, -1:], torch.sin(y)[:, -2:]

    return single(Function(run, a=linear()), {"x": ("B", 4, D)}, ["y", "z"])


def mean_of_rows(m, logits):
    chosen = logits.mean(1, keepdim=True).argmax(-1)
    return chosen, chosen == 2


def reader(run):
    """A program whose last stage reads the logits in its own way."""

    def ids(m, logits):
        chosen = run(logits).argmax(-1)
        return chosen, chosen == 2

    return chat(Rows(), last=Function(ids))


def carried():
    def run(m, visual, text, memory):
        x = torch.cat([visual, text], 1) + memory
        return m.head(x), torch.tanh(memory + x.mean(1, keepdim=True))

    inputs = {**VISUAL_AND_TEXT, "memory": ("B", 1, D)}
    return chat(Function(run, head=linear(13)), inputs, ["logits", "memory"], last=Function(mean_of_rows))


@pytest.mark.parametrize(
    ("program", "why"),
    [
        (mixes_rows, "toy.y: a result of the program"),
        (lambda: reader(lambda x: x[:, :1]), "language_model.logits: next_token reads rows 0 to 1, not the last ones"),
        (lambda: chat(Rows(), last=Function(mean_of_rows)), "language_model.logits: next_token reads all of it"),
        (lambda: reader(lambda x: x[:, -1:] + x[:, :1]), "reads rows 0 to 1, not the last ones"),
        (carried, "language_model.memory: carried from call to call"),
    ],
)
def test_left_alone(program, why):
    unchanged(program(), DropUnreadRows(), why)


def test_rows_that_two_readers_want_stay():
    after, _ = DropUnreadRows()(read_twice())
    linears = [n for n in after.stages["toy"].graph.nodes if "linear" in n.name]
    assert [shape_of(n)[1] for n in linears] == [4]
    same(read_twice(), after)


def test_twice():
    twice(chat(Rows()), DropUnreadRows())


def test_a_slice_off_by_one_row_is_caught(monkeypatch):
    keep = drop_unread_rows.keep_last

    def off_by_one(stage, output, dim, count):
        made = keep(stage, output, dim, count)
        cut = made.output_nodes()[output]
        cut.args = (*cut.args[:2], 0, 1)
        return made

    monkeypatch.setattr(drop_unread_rows, "keep_last", off_by_one)
    caught(chat(Rows()), DropUnreadRows(), "language_model")
