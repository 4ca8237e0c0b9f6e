"""Steps on 8 virtual devices against the same steps on one; prints a line of JSON.

Run by test_parallel.py in a process of its own, since the number of devices is fixed
when JAX starts.
"""

import json
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from toy import RATES, Net, batch, setup

from ftn_jax import make_optimizer, make_train_step, parallel
from ftn_jax.apply import from_linen
from ftn_jax.checkpoint import fingerprint
from ftn_jax.metrics import classification

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Small enough that the toy's kernel is split, too.
parallel._SPLIT_ABOVE = 64
STEPS = 3


def gap(found, expected):
    """Largest difference, relative to the largest value."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(
        float(np.abs(np.asarray(a) - np.asarray(b)).max(initial=0))
        / max(1.0, float(np.abs(np.asarray(b)).max(initial=0)))
        for a, b in pairs
        if jnp.issubdtype(b.dtype, jnp.floating)
    )


traces = compiled = 0


def _count(event, duration, **_):
    global compiled
    compiled += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_count)


def make(**options):
    tx = make_optimizer(RATES, steps=100, schedule="constant")

    def counted(outputs, data):
        global traces
        traces += 1
        return classification(outputs, data)

    return partial(make_train_step, from_linen(Net()), tx, loss=counted, **options)


@cache
def single_step(frozen_stats):
    return jax.jit(make(frozen_stats=frozen_stats)(axis_name=None))


def run_single(shared, state, data, *, frozen_stats):
    step, totals = single_step(frozen_stats), []
    for n in range(STEPS):
        state, sums = step(shared, state, data(n))
        totals.append(sums)
    return state, totals


def examples(n, task=0):
    """A batch of 16 of which the last 5 do not count."""
    data = batch(16, seed=100 * task + n)
    return {**data, "mask": jnp.asarray([1.0] * 11 + [0.0] * 5)}


def check(mesh, *, sync, tasks=0):
    options = {"frozen_stats": not sync}
    layout = parallel.Layout.of(mesh, sync_batch_norm=sync)
    shared, state, _ = setup()
    step = layout.train_step(make(**options))
    if tasks:
        states = [setup(seed=n)[1] for n in range(tasks)]
        singles = [
            run_single(shared, s, partial(examples, task=t), **options)
            for t, s in enumerate(states)
        ]
        expected, totals = parallel.stack([s for s, _ in singles]), None
        totals = [parallel.stack([t[n] for _, t in singles]) for n in range(STEPS)]
        state = parallel.stack(states)
        data = lambda n: parallel.stack([examples(n, t) for t in range(tasks)])  # noqa: E731
    else:
        expected, totals = run_single(shared, state, examples, **options)
        data = examples
    start = state
    placed = layout.place(shared)
    before = fingerprint(placed)
    new = layout.place(state, stacked=bool(tasks))
    worst_sums, first_step, first_compiled = 0.0, 0, 0
    for n in range(STEPS):
        old = new
        new, sums = step(placed, old, layout.put(data(n)))
        if n == 0:
            first_step, first_compiled = traces, compiled
        worst_sums = max(worst_sums, gap(sums, totals[n]))
    split = [x for x in jax.tree.leaves(placed) if not x.is_fully_replicated]
    return {
        "state": gap((new.task, new.opt_state), (expected.task, expected.opt_state)),
        "sums": worst_sums,
        "moved": gap(expected.task, start.task),
        "donated": all(x.is_deleted() for x in jax.tree.leaves(old)),
        "kept": not any(x.is_deleted() for x in jax.tree.leaves((placed, start))),
        "same_backbone": fingerprint(placed) == before == fingerprint(shared),
        "traced_again": traces - first_step,
        "compiled_again": compiled - first_compiled,
        "split": len(split),
        "devices": len(jax.tree.leaves(new)[0].sharding.device_set),
    }


def check_pmap():
    shared, state, _ = setup()
    expected, totals = run_single(shared, state, examples, frozen_stats=True)
    step = parallel.pmap_step(make(frozen_stats=True))
    placed, new = parallel.replicate(shared), parallel.replicate(state)
    first_step = 0
    for n in range(STEPS):
        old = new
        first_step = traces if n == 1 else first_step
        data = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), examples(n))
        new, sums = step(placed, old, data)
    first = jax.tree.map(lambda x: x[0], (new, sums))
    return {
        "state": gap(first[0].task, expected.task),
        "sums": gap(first[1], totals[-1]),
        "moved": gap(expected.task, state.task),
        "donated": all(x.is_deleted() for x in jax.tree.leaves(old)),
        "kept": not any(x.is_deleted() for x in jax.tree.leaves((placed, state))),
        "same_backbone": all(
            fingerprint(jax.tree.map(lambda x, n=n: x[n], placed))
            == fingerprint(shared)
            for n in (0, 7)
        ),
        "traced_again": traces - first_step,
        "split": 0,
        "devices": 8,
    }


def check_evaluation():
    """Sums over a split batch, and outputs that every process has whole."""
    layout = parallel.Layout.of("data=4,model=2")
    shared, state, _ = setup()
    from ftn_jax import make_eval_step

    apply = from_linen(Net())
    data = examples(0)
    sums = layout.eval_step(make_eval_step(apply))
    outputs = layout.eval_step(make_eval_step(apply, metrics=None))
    args = layout.place(shared), layout.place(state.task), layout.put(data)
    logits = make_eval_step(apply, metrics=None)(shared, state.task, data)
    return {
        "sums": gap(sums(*args), classification(logits, data)),
        "outputs": gap(outputs(*args), logits),
        "whole": outputs(*args).is_fully_replicated,
    }


if __name__ == "__main__":
    checks = {
        "data": partial(check, "data=8", sync=True),
        "data, model": partial(check, "data=4,model=2", sync=True),
        "data, local": partial(check, "data=8", sync=False),
        "data, model, local": partial(check, "data=2,model=4", sync=False),
        "task": partial(check, "task=8", sync=True, tasks=8),
        "two tasks a device": partial(check, "task=2,data=4", sync=True, tasks=4),
        "task, data, local": partial(check, "task=4,data=2", sync=False, tasks=4),
        "pmap": check_pmap,
        "evaluation": check_evaluation,
    }
    found = {}
    for name, call in checks.items():
        try:
            found[name] = call()
        except Exception as error:  # said by the test of that name
            found[name] = {"error": repr(error)[:2000]}
    print(json.dumps(found))
