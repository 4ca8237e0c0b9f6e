"""Killed at any step, a run on image files goes on with what it has not seen."""

import os
import signal
import socket
from collections import defaultdict
from functools import cache

import numpy as np
import pytest
from forks import Forks
from input_program import BATCH, STEPS
from PIL import Image

pytestmark = pytest.mark.long


class Run:
    """What the processes of a run printed: images seen, losses, hashes of states."""

    def __init__(self, texts):
        self.seen, self.losses, self.states = defaultdict(list), {}, []
        for line in "".join(texts).splitlines():
            match line.split():
                case ["seen", step, *images]:
                    self.seen[int(step)] += images
                case ["loss", step, value]:
                    self.losses[int(step)] = value
                case ["task", state]:
                    self.states.append(state)


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    with Forks(tmp_path_factory.mktemp("cache"), "input_program") as forks:
        yield forks


def run(forks, workdir, *, processes=1, die_at=-1):
    """Start the processes, wait for their end, and read what they printed."""
    workdir.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    outs = [workdir / f"{n}-{die_at}.out" for n in range(processes)]
    pids = [
        forks.start(
            out,
            "input_program.main",
            *(workdir, workdir.parent / "files", die_at, n, processes, address),
        )
        for n, out in enumerate(outs)
    ]
    code = forks.wait(pids[0])
    for pid in pids[1:]:
        if code:  # the others would wait for the first
            os.kill(pid, signal.SIGKILL)
        forks.wait(pid)
    texts = [out.read_text() for out in outs]
    assert code == (-signal.SIGKILL if die_at >= 0 else 0), texts[0][-3000:]
    return Run(texts)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Write ten pictures: batches of four leave two of them out of every epoch."""
    place = tmp_path_factory.mktemp("input")
    (place / "files").mkdir()
    rng = np.random.default_rng(0)
    for n in range(10):
        pixels = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(place / f"files/{n}.png")
    return place


@pytest.fixture(scope="module")
def whole(forks, place):
    """Give the uninterrupted run of so many processes."""
    return cache(lambda n: run(forks, place / f"whole{n}", processes=n))


@pytest.mark.slow
def test_two_processes_see_together_what_one_sees(whole):
    one, two = whole(1), whole(2)
    assert sorted(one.losses) == sorted(two.losses) == [*range(1, STEPS + 1)]
    assert len(set(one.losses.values())) == STEPS
    for step in one.losses:
        assert len(set(one.seen[step])) == BATCH
        assert two.seen[step] == one.seen[step]
    # The first step starts from one state; BatchNorm then sees parts of a batch.
    assert one.states != two.states


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_with_what_it_has_not_seen(forks, place, whole, processes):
    expected = whole(processes)
    workdir = place / f"killed{processes}"
    killed = run(forks, workdir, processes=processes, die_at=5)
    assert sorted(killed.losses) == [1, 2, 3, 4, 5]
    resumed = run(forks, workdir, processes=processes)
    assert sorted(resumed.losses) == [5, 6, 7]  # the last state was that of step 4
    for part in (killed, resumed):
        for step, loss in part.losses.items():
            assert loss == expected.losses[step]  # bit for bit
            assert part.seen[step] == expected.seen[step]
    assert killed.states + resumed.states == expected.states
