"""Arguments are followed exactly as far as nothing is done with them."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from ftn_jax.factored.provenance import follow

W, X = jnp.ones((3, 3)), jnp.ones((3, 3))


def tag(w, name="tag"):
    return checkpoint_name(w, name)


def look(function, *arguments):
    program = jax.make_jaxpr(function)(*arguments)
    (trail, *_), strays = follow(program, len(arguments), {"tag"})
    return trail, strays


@jax.custom_vjp
def own_gradient(w, x):
    return tag(w) @ x


own_gradient.defvjp(lambda w, x: (own_gradient(w, x), None), lambda kept, g: (g, g))

HANDED_ON = {
    "as it is": lambda w, x: tag(w) @ x,
    "in another precision": lambda w, x: tag(w.astype(jnp.bfloat16)) @ x,
    "through jit": lambda w, x: jax.jit(lambda w, x: tag(w) @ x)(w, x),
    "out of jit": lambda w, x: tag(jax.jit(lambda w: w.astype(jnp.float16))(w)) @ x,
    "through checkpoint": lambda w, x: jax.checkpoint(lambda w, x: tag(w) @ x)(w, x),
    "closed over in a scan": lambda w, x: lax.scan(
        lambda c, _: (tag(w) @ c, None), x, None, length=2
    ),
    "in a branch": lambda w, x: lax.cond(
        x.sum() > 0, lambda w, x: tag(w) @ x, lambda w, x: x, w, x
    ),
    "mapped over": lambda w, x: jax.vmap(lambda w, x: tag(w) @ x, (0, None))(w, x),
    "through another name": lambda w, x: tag(tag(w, "other")) @ x,
}
USED = {
    "transposed": (lambda w, x: tag(w.T) @ x, {"transpose"}, {"tag"}),
    "scaled": (lambda w, x: tag(2 * w) @ x, {"mul"}, {"tag"}),
    "used again": (lambda w, x: tag(w) @ x + w, {"add"}, set()),
    "put out": (lambda w, x: (tag(w) @ x, w), {"output"}, set()),
    "carried": (
        lambda w, x: lax.scan(lambda c, x: (tag(c), x @ c), w, x),
        {"scan"},
        {"tag"},
    ),
    "looped": (
        lambda w, x: lax.while_loop(lambda c: c.sum() < 0, lambda c: tag(c), w),
        {"while"},
        {"tag"},
    ),
    "given a gradient of its own": (own_gradient, {"custom_vjp_call"}, {"tag"}),
    "chosen by": (
        lambda w, x: lax.switch(w[0, 0].astype(int), [lambda x: x, jnp.sin], x),
        None,
        set(),
    ),
    "out of a branch": (
        lambda w, x: lax.cond(x.sum() > 0, lambda w: w, lambda w: 2 * w, w),
        {"cond", "mul"},
        set(),
    ),
}


@pytest.mark.parametrize("name", HANDED_ON)
def test_what_is_handed_on_is_followed(name):
    trail, strays = look(HANDED_ON[name], W, X)
    assert [s.tag for s in trail.sights] == ["tag"]
    assert not trail.others and not strays


def test_a_scan_takes_a_layer_off():
    stacked = jnp.ones((2, 3, 3))

    def layers(w, x):
        return lax.scan(lambda c, w: (tag(w) @ c, None), x, w)[0]

    trail, _ = look(layers, stacked, X)
    ((_, taken, shape),) = trail.sights
    assert (taken, shape) == (1, (3, 3)) and not trail.others


@pytest.mark.parametrize("name", USED)
def test_what_is_used_otherwise_is_noticed(name):
    function, others, stray = USED[name]
    trail, strays = look(function, W, X)
    assert trail.others == others if others else trail.others
    assert strays == stray


def test_a_tag_on_something_else_is_a_stray():
    trail, strays = look(lambda w, x: tag(w) @ x + tag(x * 2, "tag"), W, X)
    assert trail.sights and strays == {"tag"}
