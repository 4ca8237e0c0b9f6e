"""Random damage to files: a clear error or the right data, nothing else."""

import random
import shutil
from dataclasses import replace

import chex
import jax
import pytest
from saved import backbone
from toy import batch, setup

from ftn_jax import restore_task, save_task
from ftn_jax.checkpoint import TaskFileError, fingerprint
from ftn_jax.resume import StateFileError, StateFolder

pytestmark = pytest.mark.long

ROUNDS = 120


def truncate(rng, path):
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(max(1, len(content)))])


def flip(rng, path):
    content = bytearray(path.read_bytes() or b"x")
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def foreign(rng, path):
    path.write_bytes(rng.randbytes(rng.randrange(1, 300)))


def exchange(rng, path):
    """Another file of the folder stands in this one's place."""
    files = sorted(p for p in path.parents[0].rglob("*") if p.is_file())
    path.write_bytes(rng.choice(files).read_bytes())


def missing(rng, path):
    path.unlink()


def extra(rng, path):
    name = rng.choice(["x", "9", ".hidden", f"{path.name}.bak", "task-0.safetensors"])
    path.with_name(name).write_bytes(rng.randbytes(50))


def lost_folder(rng, path):
    shutil.rmtree(path.parent)


DAMAGES = [truncate, flip, flip, foreign, exchange, missing, extra, lost_folder]


def damaged(rng, source, place):
    """A copy of a folder with one random mutation; what it was."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(source, place)
    path = rng.choice(sorted(p for p in place.rglob("*") if p.is_file()))
    damage = rng.choice(DAMAGES)
    damage(rng, path)
    return f"{damage.__name__} {path.relative_to(place)}"


def test_a_mutated_task_file_is_refused_or_right(folder, tmp_path):
    rng, shared, refused = random.Random(1), backbone(), 0
    expected = restore_task(folder, shared)
    for _ in range(ROUNDS):
        done = damaged(rng, folder, tmp_path / "copy")
        try:
            found = restore_task(tmp_path / "copy", shared)
        except (TaskFileError, FileNotFoundError) as error:
            refused += 1
            assert str(tmp_path / "copy") in str(error), done
            continue
        chex.assert_trees_all_equal(found.task, expected.task)
        described = [(s.name, s.class_names, s.metadata) for s in (found, expected)]
        assert described[0] == described[1], done
    assert ROUNDS * 0.5 < refused < ROUNDS  # extra files do no harm


def same(one, two):
    return fingerprint(with_words(one)) == fingerprint(with_words(two))


def with_words(state):
    return replace(state, key=jax.random.key_data(state.key))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the last state of a run, and what is in it."""
    shared, state, step = setup()
    place = tmp_path_factory.mktemp("states") / "run"
    folder = StateFolder(place)
    for n in (1, 2):
        state, _ = jax.jit(step)(shared, state, batch(seed=n))
        folder.save(state, progress={"seconds": 1.5 * n})
    folder.close()
    return place, state


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_mutated_training_state_is_refused_or_right(saved, tmp_path, collected):
    place, last = saved
    rng, refused, gone = random.Random(2), 0, 0
    _, fresh, _ = setup()
    before = StateFolder(place)
    copy = tmp_path / "copy"
    for _ in range(ROUNDS):
        done = damaged(rng, place, copy)
        folder = StateFolder(copy)
        try:
            found = folder.restore_with_progress(fresh)
        except StateFileError as error:
            refused += 1
            assert str(copy) in str(error) and "delete the folder" in str(error), done
            continue
        finally:
            folder.close()
        if found is None:
            gone += 1  # as a whole: the run starts anew, which is right
            continue
        assert same(found[0], last), done
        assert found[1] == {"seconds": 3.0}, done
    assert refused > ROUNDS * 0.1 and refused + gone < ROUNDS
    assert same(before.restore(fresh), last)  # the copies were hit, not this
    assert not same(fresh, last)


@pytest.mark.parametrize("name", ["../up", "a/b", "..", "", " ", "a\\b", "a\nb", "\0"])
def test_a_name_that_leads_out_of_a_folder_is_refused(tmp_path, name):
    from saved import task

    with pytest.raises(TaskFileError, match="a task cannot be called"):
        save_task(tmp_path / "x", task(), shared=backbone(), name=name)
    assert not (tmp_path / "x").exists()
