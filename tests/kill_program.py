"""A sweep in little, run to be killed: some rows, a state saved after every step."""

import itertools
from pathlib import Path

import jax
from toy import batch, setup

from ftn_jax import save_task
from ftn_jax.checkpoint import fingerprint
from ftn_jax.fit import fit
from ftn_jax.results import Results, Row
from ftn_jax.resume import StateFolder


def batches(start):
    for n in itertools.count(start):
        yield batch(seed=n)


def main(workdir, rows, steps):
    workdir = Path(workdir)
    results = Results(workdir, experiment="kill", config={})
    step = None
    for seed in range(int(rows)):
        if results.find("toy", "noise", seed, inputs="same"):
            continue
        shared, state, pure = setup(seed=seed)
        step = step or jax.jit(pure, donate_argnums=1)
        folder = StateFolder(workdir / "state" / str(seed), keep=2)
        state, progress = folder.restore_with_progress(state) or (state, None)
        print("restored", seed, int(state.step), flush=True)
        state = fit(
            step,
            shared,
            state,
            batches,
            steps=int(steps),
            on_log=lambda n, means: print("step", n, flush=True),
            log_every=1,
            save=folder.save,
            save_every_s=0.0,
            progress=progress,
        )
        folder.close()
        save_task(workdir / "tasks" / str(seed), state.task, shared=shared, name="toy")
        results.add(
            Row(
                method="toy",
                task="noise",
                seed=seed,
                metric="hash",
                value=float(
                    int(fingerprint(state.task)["delta/conv/kernel/factors/0"][:8], 16)
                ),
                task_params=0,
                shared_params=0,
                steps=int(state.step),
                seconds=0.0,
                by_group={},
                details={},
                inputs="same",
            )
        )
        folder.clear()
    print("done", flush=True)
