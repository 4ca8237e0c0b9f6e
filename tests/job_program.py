"""One process of a job: trains the toy over a mesh, each process on its own rows."""

import itertools
import json
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
from toy import RATES, Net, batch, setup

from ftn_jax import (
    jobs,
    make_eval_step,
    make_optimizer,
    make_train_step,
    parallel,
    save_task,
)
from ftn_jax.apply import from_linen
from ftn_jax.atomic import write_atomic
from ftn_jax.command import exit_codes
from ftn_jax.fit import fit
from ftn_jax.metrics import means
from ftn_jax.resume import StateFolder

BATCH = 8


def main(workdir, mesh, steps):
    with exit_codes():
        jax.config.update("jax_num_cpu_devices", int(os.environ.get("DEVICES", "1")))
        jobs.start(heartbeat_s=10)
        _run(Path(workdir), mesh, int(steps))


def experiment(workdir, mesh):
    """A table by two methods, as `python -m experiments.multi_domain` makes it."""
    from experiments import multi_domain

    with exit_codes():
        jobs.start(heartbeat_s=10)
        multi_domain.main(
            replace(
                multi_domain.Config.tiny(),
                workdir=Path(workdir),
                methods=("ftn", "bn_head"),
                max_train=64,
                select="best_on_validation",
                mesh=None if mesh == "none" else mesh,
            )
        )


def _run(workdir, mesh, steps):
    layout = parallel.Layout.of(mesh)
    shared, state, _ = setup()
    tx = make_optimizer(RATES, steps=100, schedule="constant")
    make = partial(make_train_step, from_linen(Net()), tx)
    index, count = layout.rows(BATCH)
    size = BATCH // count

    def batches(start):
        for n in itertools.count(start):
            whole = batch(BATCH, seed=n)
            own = slice(index * size, (index + 1) * size)
            yield layout.put({k: np.asarray(x)[own] for k, x in whole.items()})
            time.sleep(float(os.environ.get("PAUSE", "0")))

    placed, state = layout.place(shared), layout.place(state)
    folder = StateFolder(workdir / "state")
    state, progress = folder.restore_with_progress(state) or (state, None)
    print("restored", int(state.step), flush=True)
    state = fit(
        layout.train_step(make),
        placed,
        state,
        batches,
        steps=steps,
        on_log=lambda n, means: print("step", n, flush=True),
        log_every=1,
        save=folder.save,
        save_every_s=float(os.environ.get("SAVE_EVERY", "0")),
        progress=progress,
    )
    folder.close()
    whole = {k: np.asarray(x) for k, x in batch(64, seed=1000).items()}
    rows = slice(index * 64 // count, (index + 1) * 64 // count)
    test = layout.put({k: x[rows] for k, x in whole.items()})
    score = layout.eval_step(make_eval_step(from_linen(Net())))
    found = means(score(placed, state.task, test))
    save_task(workdir / "task", state.task, shared=placed, name="toy")
    if jax.process_index() == 0:
        text = json.dumps({"means": found, "processes": jax.process_count()})
        write_atomic(workdir / "result.json", text.encode())
    print("done", flush=True)
