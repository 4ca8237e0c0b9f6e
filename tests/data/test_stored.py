"""Damaged files of arrays, pictures and tables: read, or refused by name."""

import random
import shutil

import numpy as np
import pytest
from pictures import save_ramp, write_fer2013
from scipy.io import savemat

from ftn_jax.data import load_fer2013, load_npz
from ftn_jax.data.dense import BSDSFolder, load_bsds
from ftn_jax.data.nyud import NYUDFolder
from ftn_jax.data.scenes import write_nyud

ROUNDS = 60


def nyud(place):
    root = write_nyud(place, train=1, val=1, size=(8, 8))
    return lambda: NYUDFolder(root)[0], [*root.rglob("0001.*")]


def bsds(place):
    folder = place / "images/train", place / "groundTruth/train"
    picture = save_ramp(folder[0] / "a.jpg")
    folder[1].mkdir(parents=True)
    cells = np.empty((1, 2), object)
    for n in range(2):
        cells[0, n] = {"Boundaries": np.eye(10, 12, dtype=np.uint8)}
    truth = folder[1] / "a.mat"
    savemat(truth, {"groundTruth": cells}, do_compression=True)
    return lambda: BSDSFolder(place)[0], [picture, truth]


def bsds_arrays(place):
    path, zeros = place / "edges.npz", np.zeros((2, 8, 8, 3), np.uint8)
    parts = ("train", "val", "test")
    arrays = {f"x_{s}": zeros for s in parts} | {f"edge_{s}": zeros for s in parts}
    np.savez_compressed(path, **arrays)
    return lambda: load_bsds(path), [path]


def fer2013(place):
    path = write_fer2013(place / "fer2013.csv")
    return lambda: load_fer2013(path), [path]


def npz(place):
    path, images = place / "pets.npz", np.zeros((3, 4, 5, 3), np.uint8)
    labels = np.arange(3)
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
    return lambda: load_npz(path), [path]


def damage(rng, path):
    content = bytearray(path.read_bytes())
    kind = rng.randrange(3)
    if kind == 0:
        content = content[: rng.randrange(len(content))]
    elif kind == 1:
        for _ in range(rng.randrange(1, 6)):
            content[rng.randrange(len(content))] = rng.randrange(256)
    else:
        content = rng.randbytes(60)
    path.write_bytes(content)


@pytest.mark.parametrize("make", [nyud, bsds, bsds_arrays, fer2013, npz])
def test_damaged_files_are_refused_by_name(make, tmp_path):
    rng, refused = random.Random(0), 0
    whole, copy = tmp_path / "whole", tmp_path / "copy"
    whole.mkdir()
    read, files = make(whole)
    read()
    shutil.copytree(whole, copy)
    for _ in range(ROUNDS):
        path = rng.choice(files)
        damage(rng, path)
        try:
            read()
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
        shutil.copyfile(copy / path.relative_to(whole), path)
    read()
    assert refused > ROUNDS * 0.5
