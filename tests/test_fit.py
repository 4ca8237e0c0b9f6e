"""The loop: where it stops, what it keeps, and that it goes on as if nothing was."""

import itertools
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest
from toy import batch, setup

from ftn_jax.fit import NonFiniteLoss, Terminated, fit
from ftn_jax.resume import StateFileError, StateFolder


def batches(start):
    for n in itertools.count(start):
        yield batch(seed=n)


def test_fit_logs_means_and_takes_exactly_the_steps():
    shared, state, step = setup()
    logs = []
    state = fit(
        jax.jit(step, donate_argnums=1),
        shared,
        state,
        batches,
        steps=25,
        on_log=lambda n, means: logs.append((n, means)),
        log_every=10,
    )
    assert int(state.step) == 25
    assert [n for n, _ in logs] == [10, 20, 25]
    assert all(0 <= m["accuracy"] <= 1 and m["nonfinite"] == 0 for _, m in logs)


def test_resumed_run_equals_an_uninterrupted_one(tmp_path):
    shared, start, step = setup()
    jitted = jax.jit(step)
    whole = fit(jitted, shared, start, batches, steps=12)
    folder = StateFolder(tmp_path / "state")
    assert folder.restore(start) is None
    folder.save(fit(jitted, shared, start, batches, steps=5))
    restored = folder.restore(start)
    assert int(restored.step) == 5
    chex.assert_trees_all_equal(fit(jitted, shared, restored, batches, steps=12), whole)
    folder.clear()
    assert folder.restore(start) is None


def test_state_of_another_configuration_is_refused(tmp_path):
    _, state, _ = setup()
    folder = StateFolder(tmp_path / "state")
    folder.save(state)
    other = jax.tree.map(
        lambda x: jnp.zeros((*x.shape, 2)) if x.shape == (8,) else x, state
    )
    with pytest.raises(ValueError, match="another configuration.*delete the folder"):
        folder.restore(other)


def test_an_earlier_state_than_the_last_is_not_dropped_without_a_word(tmp_path):
    _, state, _ = setup()
    folder = StateFolder(tmp_path / "state")
    folder.save(replace(state, step=state.step + 7), wait=True)
    with pytest.raises(StateFileError, match="holds a state of step 7.*of step 0: go"):
        folder.save(state)


def test_nonfinite_loss_stops_and_keeps_the_last_good_state(tmp_path):
    shared, state, step = setup()

    def poisoned(start):
        for n, data in enumerate(batches(start), start):
            bad = n >= 7
            yield {**data, "image": data["image"] * (jnp.nan if bad else 1)}

    good = fit(jax.jit(step), shared, state, poisoned, steps=7, log_every=4)
    folder = StateFolder(tmp_path / "state")
    with pytest.raises(NonFiniteLoss, match="after step 7.*last good state") as caught:
        fit(
            jax.jit(step),
            shared,
            state,
            poisoned,
            steps=20,
            log_every=4,
            save=folder.save,
        )
    for found in (caught.value.state, folder.restore(state)):
        chex.assert_trees_all_equal(found.task, good.task)
        chex.assert_trees_all_equal(found.opt_state, good.opt_state)
        assert int(found.step) == 7 and not found.finite


def test_one_bad_batch_stops_every_run_at_the_same_place(tmp_path):
    shared, state, step = setup()

    def one_bad(start):
        for n, data in enumerate(batches(start), start):
            yield {**data, "image": data["image"] * (jnp.nan if n == 5 else 1)}

    good = fit(jax.jit(step), shared, state, one_bad, steps=5)
    folder, messages = StateFolder(tmp_path / "state"), []
    for _ in range(2):  # the second run starts from what the first one saved
        start = folder.restore(state) or state
        with pytest.raises(NonFiniteLoss) as caught:
            fit(jax.jit(step), shared, start, one_bad, steps=30, save=folder.save)
        messages.append(str(caught.value))
        chex.assert_trees_all_equal(caught.value.state.task, good.task)
        assert int(caught.value.state.step) == 5
    assert messages[0] == messages[1]


def test_batches_that_end_early_are_an_error():
    shared, state, step = setup()
    with pytest.raises(ValueError, match="ended after step 3, expected 5"):
        fit(
            jax.jit(step),
            shared,
            state,
            lambda start: itertools.islice(batches(start), 3),
            steps=5,
        )


@pytest.mark.parametrize(
    ("number", "raised"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)],
)
def test_a_signal_saves_and_raises(tmp_path, number, raised):
    shared, state, step = setup()
    folder = StateFolder(tmp_path / "state")

    def interrupting(start):
        for n, data in enumerate(batches(start), start):
            if n == 3:
                os.kill(os.getpid(), number)
            yield data

    before = signal.getsignal(number)
    with pytest.raises(raised):
        fit(
            jax.jit(step, donate_argnums=1),
            shared,
            state,
            interrupting,
            steps=50,
            save=folder.save,
        )
    assert signal.getsignal(number) is before
    _, fresh, _ = setup()
    state, progress = folder.restore_with_progress(fresh)
    assert int(state.step) == 4
    assert progress["seconds"] > 0 and progress["window"]["count"] == 4 * 8


def test_second_ctrl_c_does_not_wait():
    code = """
    import os, signal
    from ftn_jax.fit import _signals
    # A job in the background may have been started with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with _signals() as asked:
            os.kill(os.getpid(), signal.SIGINT)
            assert asked == [KeyboardInterrupt]
            os.kill(os.getpid(), signal.SIGINT)
            print("not reached")
    except KeyboardInterrupt:
        print("stopped")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        timeout=120,
    )
    assert done.stdout.strip() == "stopped", done.stderr


def test_a_log_goes_on_where_it_stopped(tmp_path):
    """The means over the steps of before and after a resume are those of all."""
    shared, start, step = setup()
    jitted, whole, parts = jax.jit(step), [], []
    fit(jitted, shared, start, batches, steps=10, on_log=lambda *x: whole.append(x))
    folder = StateFolder(tmp_path / "state")

    def stopping(first):
        for n, data in enumerate(batches(first), first):
            if n == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield data

    with pytest.raises(Terminated):
        fit(jitted, shared, start, stopping, steps=10, save=folder.save)
    state, progress = folder.restore_with_progress(start)
    fit(
        jitted,
        shared,
        state,
        batches,
        steps=10,
        on_log=lambda *x: parts.append(x),
        progress=progress,
    )
    assert parts[0][0] == whole[0][0] == 10
    assert parts[0][1] == pytest.approx(whole[0][1], rel=1e-6)


def test_the_last_states_stay_and_the_best(tmp_path):
    shared, state, step = setup()
    folder = StateFolder(tmp_path / "state", keep=2, best="accuracy")
    jitted = jax.jit(step, donate_argnums=1)
    expected = {}
    for n, accuracy in enumerate([0.1, 0.9, 0.5, 0.3, 0.2], 1):
        state, _ = jitted(shared, state, batch(seed=n))
        expected[n] = jax.tree.map(jnp.copy, state)
        # Donated by the next step while it is still being written.
        folder.save(state, metrics={"accuracy": accuracy}, progress={"n": n})
    folder.close()
    assert sorted(p.name for p in folder.directory.iterdir()) == ["2", "4", "5"]
    _, fresh, _ = setup()
    for best, n in ((False, 5), (True, 2)):
        found, progress = folder.restore_with_progress(fresh, best=best)
        chex.assert_trees_all_equal(found, expected[n])
        assert progress == {"n": n}
