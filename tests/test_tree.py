"""Trees: names, snapshots that survive a failing trace, selection, the random key."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_fit._tree import RandomState, assign, leaves, named_arrays, restore, select, snapshot

TREES = st.recursive(
    st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=12,
)


def test_leaves_have_dotted_paths():
    tree = {"a": [1, (2, {"b": 3})], "c": {}}
    assert list(leaves(tree)) == [("a.0", 1), ("a.1.0", 2), ("a.1.1.b", 3)]
    assert list(leaves(5)) == [("", 5)]


def test_leaves_are_set_by_name_also_where_keys_hold_dots_or_digits():
    tree = {"a.b": {"0": 1}, "c": [2, (3, {"d": 4})]}
    inner = tree["c"]
    assign(tree, [("a.b.0", 5), ("c.0", 6), ("c.1.1.d", 7)])
    assert tree == {"a.b": {"0": 5}, "c": [6, (3, {"d": 7})]}
    assert tree["c"] is inner
    with pytest.raises(KeyError):
        assign(tree, [("a.c", 1)])


def test_arrays_are_named_as_mlx_names_parameters():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm(3))
    assert named_arrays(model.parameters()) == tree_flatten(model.parameters())


@given(TREES.filter(lambda tree: isinstance(tree, (dict, list))), st.randoms())
def test_restoring_gives_back_the_tree_in_place(tree, random):
    """Whatever happened to the containers: the same leaves, in the same objects."""
    before, saved = repr(tree), snapshot(tree)
    containers = list(walk(tree))
    for container in containers:
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            if not isinstance(container[key], (dict, list)):
                container[key] = random.random()
        if isinstance(container, dict):
            container[f"new {random.random()}"] = [1]
        else:
            container.append(1)
    restore(tree, saved)
    assert repr(tree) == before
    assert [id(c) for c in walk(tree)] == [id(c) for c in containers]


def walk(tree):
    if isinstance(tree, (dict, list)):
        yield tree
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from walk(value)


def test_a_model_and_an_optimizer_are_restored_after_a_trace_that_failed():
    model, optimizer = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm(3)), optim.Adam(0.1)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]
    before = [np.array(value) for _, value in tree_flatten(state)]
    saved = snapshot(state)

    def failing(x):
        def loss(parameters):
            model.update(parameters)
            return model(x).sum()

        optimizer.update(model, mx.grad(loss)(model.trainable_parameters()))
        raise RuntimeError

    with pytest.raises(RuntimeError):
        mx.compile(failing, inputs=state, outputs=state)(mx.ones((4, 2)))
    restore(state, saved)
    for value, kept in zip(tree_flatten(state), before, strict=True):
        np.testing.assert_array_equal(np.array(value[1]), kept)
    model(mx.ones((4, 2)))  # BatchNorm still writes its statistics


def test_a_snapshot_keeps_the_leaves_themselves():
    array = mx.ones(2)
    assert snapshot({"a": [array]})["a"][0] is array


@pytest.mark.parametrize("holds", [True, False])
def test_selection_takes_the_new_or_the_old_leaves_in_place(holds):
    tree = {"a": [mx.array(1.0), mx.array(2.0)], "same": mx.array(3.0), "name": "x"}
    saved = snapshot(tree)
    tree["a"][0], tree["a"][1] = mx.array(np.nan), mx.array(5.0)
    inner, same = tree["a"], tree["same"]
    select(mx.array(holds), tree, saved)
    expected = [np.nan, 5.0] if holds else [1.0, 2.0]
    np.testing.assert_array_equal([value.item() for value in tree["a"]], expected)
    assert tree["a"] is inner
    assert tree["same"] is same


def test_selection_leaves_alone_what_is_new():
    tree = {"a": mx.array(1.0), "list": [mx.array(2.0)]}
    saved = snapshot(tree)
    tree["new"], tree["a"] = mx.array(7.0), mx.array(3.0)
    tree["list"].append(mx.array(8.0))
    select(mx.array(False), tree, saved)
    values = [tree["a"], tree["new"], *tree["list"]]
    assert [value.item() for value in values] == [1, 7, 2, 8]


def test_the_random_key_goes_on_exactly_where_it_was():
    mx.random.seed(2**63 + 12345)
    mx.random.normal((3,))
    state = RandomState()
    first = np.array(mx.random.normal((5,)))
    mx.random.seed(1)
    RandomState(state.words).restore()
    np.testing.assert_array_equal(np.array(mx.random.normal((5,))), first)
