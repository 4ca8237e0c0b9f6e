"""A network of one convolution and a learnable task, small enough for every test."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ftn_jax import TaskState, make_delta, make_optimizer, make_train_step
from ftn_jax.apply import from_linen
from ftn_jax.nodes import CP, Replace


class Net(nn.Module):
    """A conv, a BatchNorm, dropout, a head."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), name="conv", use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="bn")(x)
        x = nn.relu(x).mean(axis=(1, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(3, name="head")(x)


RULES = {
    "conv/kernel": partial(CP.init, rank=2, init="xavier"),
    "bn/.*": Replace.init,
    "head/.*": partial(Replace.init, group="head", shape=(..., 3)),
}
RATES = {"factors": 1e-2, "norm": 1e-1, "head": 1e-1}


def setup(seed=0, model=None, tx=None, **options):
    model = model or Net()
    variables = model.init(jax.random.key(seed), jnp.zeros((1, 8, 8, 3)))
    shared, model_state = variables["params"], {"batch_stats": variables["batch_stats"]}
    delta = make_delta(jax.random.key(seed + 1), shared, RULES)
    tx = tx or make_optimizer(RATES, steps=100, schedule="constant")
    state = TaskState.create(delta, model_state, tx=tx, key=jax.random.key(seed + 2))
    return shared, state, make_train_step(from_linen(model), tx, **options)


def batch(n=8, seed=0):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, n).astype(np.int32)
    image = rng.normal(size=(n, 8, 8, 3)) + label[:, None, None, None] * [1.0, -1, 0.5]
    return {"image": jnp.asarray(image, jnp.float32), "label": jnp.asarray(label)}
