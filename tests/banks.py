"""Networks with several random tasks, and their outputs one by one."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ftn_jax import Task, make_delta, materialize
from ftn_jax.apply import from_linen
from ftn_jax.models.resnet import ResNet
from ftn_jax.node import is_node
from ftn_jax.nodes import CP, LoRA, Replace

PX = 12


class Attention(nn.Module):
    """One pre-LN block with Flax's own attention, and a head on the mean token."""

    classes: int = 7

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(16, (4, 4), strides=(4, 4), padding="VALID", name="patches")(x)
        x = x.reshape(len(x), -1, 16)
        y = nn.LayerNorm(name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(y)
        y = nn.RMSNorm(name="norm2")(x)
        x = x + nn.Dense(16, name="out")(nn.gelu(nn.Dense(32, name="in")(y)))
        return nn.Dense(self.classes, name="head")(x.mean(axis=1))


@cache
def resnet(classes=7):
    """Two blocks, the second of stride 2 with a projection."""
    return ResNet((1, 1), num_classes=classes, width=4, stem="3x3")


@cache
def attention(classes=7):
    return Attention(classes)


def conv_rules(rank, classes):
    return {
        "stem/conv/kernel": partial(LoRA.init, rank=rank, alpha=3 * rank),
        r".*conv\d?/kernel": partial(CP.init, rank=rank, scale=1.7),
        ".*bn.*/(scale|bias)": Replace.init,
        "head/.*": partial(Replace.init, group="head", shape=(..., classes)),
    }


def attention_rules(rank, classes):
    return {
        "patches/bias": Replace.init,
        "patches/kernel": partial(CP.init, rank=rank),
        "attention/(query|key)/kernel": partial(CP.init, rank=rank, scale=0.3),
        "attention/value/kernel": partial(LoRA.init, rank=rank, inputs=1),
        "attention/out/(kernel|bias)": partial(Replace.init, group="weights"),
        "attention/query/bias": partial(CP.init, rank=rank),
        "in/kernel": partial(LoRA.init, rank=rank),
        "norm./(scale|bias)": Replace.init,
        "head/.*": partial(Replace.init, group="head", shape=(..., classes)),
    }


NETWORKS = {"resnet": (resnet, conv_rules), "attention": (attention, attention_rules)}
SETTINGS = {"a": (1, 3), "b": (4, 5), "c": (1, 3)}  # rank, classes


def task(rules, shared, state, *, seed):
    """A task of random arrays that move every weight, none out of all proportion."""
    rng = np.random.default_rng(seed)
    start = jax.eval_shape(
        lambda key: make_delta(key, shared, rules), jax.random.key(0)
    )

    def draw(node):
        low, width = (0.5, 0.3) if isinstance(node, Replace) else (0.0, 0.3)
        return jax.tree.map(
            lambda x: jnp.asarray(low + width * rng.normal(size=x.shape), x.dtype), node
        )

    delta = jax.tree.map(draw, start, is_leaf=is_node)
    state = jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x) + rng.uniform(0, 0.5, x.shape), x.dtype),
        state,
    )
    return Task(delta, state)


def initial(model, x):
    """Return parameters and state of a network, drawn without compiling anything."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    rng = np.random.default_rng(0)

    def draw(path, x):
        name = path[-1].key
        if name in ("scale", "var"):
            return jnp.ones(x.shape, x.dtype)
        fan_in = max(1, np.prod(x.shape[:-1]))
        return jnp.asarray(rng.normal(0, (2 / fan_in) ** 0.5, x.shape), x.dtype)

    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    return variables["params"], {k: v for k, v in variables.items() if k != "params"}


@cache
def start(name):
    return initial(NETWORKS[name][0](), jnp.zeros((1, PX, PX, 3)))


def build(name, settings=None):
    """Return the network, the backbone, and several tasks of it."""
    make, rules = NETWORKS[name]
    shared, state = start(name)
    tasks = {
        task_name: task(rules(*options), shared, state, seed=seed)
        for seed, (task_name, options) in enumerate((settings or SETTINGS).items(), 1)
    }
    return make, shared, tasks


def classes_of(task):
    return task.delta["head"]["kernel"].value.shape[-1]


@partial(jax.jit, static_argnums=0)
def _alone(model, shared, task, images):
    params = materialize(shared, task.delta)
    apply = from_linen(model)
    return apply(params, task.model_state, {"image": images}, train=False)[0]


def alone(make, shared, task, images):
    """One task's outputs: its materialized parameters in a network of its head."""
    return _alone(make(classes_of(task)), shared, task, images)


def images(count, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(count, PX, PX, 3)), jnp.float32)
