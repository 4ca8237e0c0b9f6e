"""Training on image files, run to be killed: says what it sees and what it loses.

A state is saved after every second step; the process kills itself after step DIE_AT,
and where that is odd, a step is lost that was already taken.
"""

import hashlib
import itertools
import os
import signal
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from toy import RATES, Net, setup

from ftn_jax import make_optimizer, make_train_step
from ftn_jax.apply import from_linen
from ftn_jax.data import (
    Compose,
    FileSource,
    Flip,
    Normalize,
    RandomCrop,
    prefetch,
    train_batches,
)
from ftn_jax.fit import fit

STEPS, BATCH = 7, 4
TRANSFORM = Compose([RandomCrop(8, padding=1), Flip(), Normalize((0.5,), (0.25,))])


def main(workdir, files, die_at, process, processes, address):
    """Train; die after step `die_at` if there is one."""
    workdir, die_at = Path(workdir), int(die_at)
    process, processes = int(process), int(processes)
    if processes > 1:
        jax.distributed.initialize(address, processes, process)
    mesh = jax.make_mesh((processes,), ("data",))
    split, whole = (NamedSharding(mesh, spec) for spec in (P("data"), P()))
    paths = sorted(Path(files).glob("*.png"))
    source = FileSource(paths, np.arange(len(paths)) % 3)
    tx = make_optimizer(RATES, steps=100, schedule="constant")
    shared, state, _ = setup(tx=tx)
    step = jax.jit(
        jax.shard_map(
            make_train_step(from_linen(Net()), tx, axis_name="data"),
            mesh=mesh,
            in_specs=(P(), P(), P("data")),
            out_specs=(P(), P()),
        )
    )
    shared, state = (_replicate(tree, whole) for tree in (shared, state))
    state = _restore(workdir, state, whole)

    def batches(start_step):
        stream = train_batches(
            source,
            batch_size=BATCH,
            transform=TRANSFORM,
            seed=5,
            start_step=start_step,
            shard=(process, processes),
        )
        for n, batch in enumerate(prefetch(stream), start_step + 1):
            seen = [hashlib.sha256(x.tobytes()).hexdigest() for x in batch["image"]]
            print("seen", n, *seen, flush=True)
            put = partial(jax.make_array_from_process_local_data, split)
            yield {name: put(array) for name, array in batch.items()}

    def on_log(n, means):
        print("loss", n, means["loss"].hex(), flush=True)
        if n == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    for last in itertools.chain(range(2, STEPS, 2), [STEPS]):
        if int(state.step) < last:
            state = fit(
                step, shared, state, batches, steps=last, on_log=on_log, log_every=1
            )
            if process == 0:
                _save(workdir, state)


def _replicate(tree, sharding):
    """Put the same values on every device of every process."""

    def put(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(x)))
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])

    return jax.tree.map(put, tree)


def _words(state):
    """Give the leaves as plain arrays."""
    prng = jax.dtypes.prng_key
    return [
        np.asarray(
            jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, prng) else x
        )
        for x in jax.tree.leaves(state)
    ]


def _save(workdir, state):
    new = workdir / "new.npz"
    np.savez(new, *_words(state))
    new.rename(workdir / "state.npz")
    print(
        "task",
        hashlib.sha256(b"".join(map(bytes, _words(state)))).hexdigest(),
        flush=True,
    )


def _restore(workdir, like, sharding):
    if not (workdir / "state.npz").exists():
        return like
    with np.load(workdir / "state.npz") as arrays:
        words = [arrays[name] for name in arrays.files]
    leaves, structure = jax.tree.flatten(like)
    prng = jax.dtypes.prng_key
    values = [
        jax.random.wrap_key_data(w) if jax.dtypes.issubdtype(x.dtype, prng) else w
        for w, x in zip(words, leaves, strict=True)
    ]
    return _replicate(jax.tree.unflatten(structure, values), sharding)
