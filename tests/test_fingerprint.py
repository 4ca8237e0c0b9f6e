"""A task opens on its own backbone and on no other."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from saved import assert_same, backbone

from ftn_jax import (
    restore_task,
)
from ftn_jax.checkpoint import TaskFileError, fingerprint


@pytest.mark.parametrize(
    ("path", "change", "why"),
    [
        ("conv/kernel", lambda w: w.at[2, 1, 0, 3].add(1e-6), "values, shape or dtype"),
        ("conv/kernel", lambda w: w.reshape(3, 3, 4, 3), "values, shape or dtype"),
        ("conv/kernel", lambda w: w.astype(jnp.bfloat16), "values, shape or dtype"),
        ("head/kernel", lambda w: None, "this backbone has no such leaf"),
        ("head/more", lambda _: jnp.ones(2), "the task's backbone has no such leaf"),
    ],
)
def test_another_backbone_is_refused_by_its_first_leaf(folder, path, change, why):
    shared = backbone()
    room, leaf = path.split("/")
    shared[room][leaf] = change(shared[room].get(leaf))
    with pytest.raises(
        TaskFileError, match=f"first leaf that differs is {path}: .*{why}"
    ):
        restore_task(folder, shared)


def test_leaves_that_the_task_replaces_may_differ(folder):
    shared = backbone()
    shared["conv"]["bias"] += 1
    shared["head"]["kernel"] = jnp.ones((4, 7))  # the backbone with another head
    assert_same(
        restore_task(folder, shared).task, restore_task(folder, backbone()).task
    )


def test_of_several_differences_the_first_is_named(folder):
    shared = jax.tree.map(lambda w: w + 1, backbone())
    with pytest.raises(TaskFileError, match="differs is conv/kernel:"):
        restore_task(folder, shared)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.float32([1, 2]), np.float32([1, np.nextafter(np.float32(2), 3)])),
        (np.float32([0.0]), np.float32([-0.0])),
        (np.ones((2, 3)), np.ones((3, 2))),
        (np.ones(()), np.ones(1)),
        (np.ones(6), np.ones((1, 6))),
        (np.zeros(2, np.float32), np.zeros(2, np.int32)),
        (np.zeros(4, np.float16), np.zeros(4, jnp.bfloat16)),
        (np.zeros((0, 2)), np.zeros((2, 0))),
        (np.arange(6.0).reshape(2, 3), np.arange(6.0).reshape(2, 3)[::-1]),
        (np.arange(1.0, 7.0), -np.arange(1.0, 7.0)),
        (np.arange(1, 7, dtype=np.complex64) * 1j, np.arange(1, 7) * np.complex64(-1j)),
    ],
)
def test_fingerprint_sees(a, b):
    assert fingerprint({"w": a}) != fingerprint({"w": b})
    assert fingerprint({"w": a}) == fingerprint({"w": a.copy()})


def test_fingerprint_is_of_values_not_of_memory_or_container():
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    turned = np.asfortranarray(x)
    assert fingerprint({"w": x}) == fingerprint({"w": turned})
    assert fingerprint({"w": x}) == fingerprint({"w": jnp.asarray(x)})
    assert fingerprint({"w": x}) == fingerprint(nnx.State({"w": nnx.Param(x)}))
    assert fingerprint({"w": x}) != fingerprint({"v": x})


def test_fingerprint_of_100_megabytes_is_quick():
    tree = {"w": np.zeros((25, 1024, 1024), np.float32)}
    start = time.perf_counter()
    fingerprint(tree)
    assert time.perf_counter() - start < 2
