"""NYUD in both archives, BSDS500 as published, and the rooms that imitate them."""

import numpy as np
import pytest

from ftn_jax.data.dense import BSDSFolder, DenseArrays, load_bsds
from ftn_jax.data.nyud import NYUDFolder
from ftn_jax.data.scenes import draw_scene, scenes, write_nyud

SIZE = (24, 32)


@pytest.fixture(scope="module")
def nyud(tmp_path_factory):
    return write_nyud(tmp_path_factory.mktemp("nyud"), train=3, val=2, size=SIZE)


def repack(root, folder):
    """Write the same examples in the other archive's formats."""
    from PIL import Image
    from scipy.io import loadmat

    for name in ("gt_sets", "images"):
        (folder / name).mkdir(parents=True)
        for file in (root / name).iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
    for name in ("edge", "segmentation", "normals", "depth"):
        (folder / name).mkdir()
    for file in (root / "depth").iterdir():
        name = file.stem
        np.save(folder / f"depth/{name}.npy", loadmat(file)["depth"])
        labels = loadmat(root / f"segmentation/{name}.mat")["segmentation"]
        Image.fromarray(labels.astype(np.uint8)).save(
            folder / f"segmentation/{name}.png"
        )
        normals = np.asarray(Image.open(root / f"normals/{name}.jpg"), np.float32)
        np.save(folder / f"normals/{name}.npy", 2 * normals / 255 - 1)
        edge = np.asarray(Image.open(root / f"edge/{name}.png"), np.float32)
        np.save(folder / f"edge/{name}.npy", edge / 255)
    return folder


def test_both_archives_hold_the_same(nyud, tmp_path):
    first = NYUDFolder(nyud, "train")
    second = NYUDFolder(repack(nyud, tmp_path / "repack"), "train")
    assert len(first) == len(second) == 3 and len(NYUDFolder(nyud, "val")) == 2
    for a, b in zip((first[i] for i in range(3)), second, strict=False):
        np.testing.assert_array_equal(a.image, b.image)
        for name, array in a.targets.items():
            np.testing.assert_allclose(array, b.targets[name], atol=1e-6)


def test_files_give_back_what_the_generator_drew(nyud):
    rng = np.random.default_rng((0, 0x5CE))
    found = NYUDFolder(nyud, "train")
    for i in range(3):
        scene, example = draw_scene(rng, size=SIZE), found[i]
        for name in ("semseg", "depth", "edge"):
            np.testing.assert_array_equal(example.targets[name], getattr(scene, name))
        known = (scene.normals != 0).any(-1)
        error = np.abs(example.targets["normals"] - scene.normals)[known]
        assert error.mean() < 0.06  # JPEG
        assert np.abs(example.image.astype(int) - scene.image).mean() < 4


def test_only_what_is_asked_for_is_read(nyud):
    example = NYUDFolder(nyud, "val", targets=("depth",))[0]
    assert [*example.targets] == ["depth"]
    with pytest.raises(ValueError, match=r"targets \['colour'\]: unknown"):
        NYUDFolder(nyud, targets=("colour",))


def test_nan_and_infinite_depth_are_missing(nyud, tmp_path):
    folder = repack(nyud, tmp_path / "nan")
    path = folder / "depth" / "0001.npy"
    depth = np.load(path)
    depth[0, :2] = (np.nan, np.inf)
    np.save(path, depth)
    found = NYUDFolder(folder, "train")[0].targets["depth"]
    assert found[0, :2].tolist() == [0, 0] and np.isfinite(found).all()


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        ("gt_sets/train.txt", FileNotFoundError, "train.txt: missing"),
        ("images/0001.jpg", FileNotFoundError, "0001.jpg: missing"),
        ("depth/0002.mat", FileNotFoundError, "expected one of"),
    ],
)
def test_missing_files_are_named(tmp_path, damage, error, message):
    root = write_nyud(tmp_path, train=2, val=1, size=(8, 8))
    (root / damage).unlink()
    with pytest.raises(error, match=message):
        NYUDFolder(root, "train")


def test_damaged_files_are_named(tmp_path):
    from scipy.io import savemat

    root = write_nyud(tmp_path, train=1, val=1, size=(8, 8))
    savemat(root / "depth/0001.mat", {"other": np.zeros((8, 8))})
    with pytest.raises(ValueError, match="0001.mat.*expected the key 'depth'"):
        NYUDFolder(root, targets=("depth",))[0]
    savemat(root / "depth/0001.mat", {"depth": np.zeros((4, 8))})
    with pytest.raises(ValueError, match=r"found size \(4, 8\), expected \(8, 8\)"):
        NYUDFolder(root, targets=("depth",))[0]
    savemat(root / "depth/0001.mat", {"depth": np.full((8, 8), -0.5)})
    with pytest.raises(
        ValueError, match=r"0001.mat: found values -0.5..-0.5, expected"
    ):
        NYUDFolder(root, targets=("depth",))[0]
    (root / "edge/0001.png").unlink()
    np.save(root / "edge/0001.npy", np.full((8, 8), 255, np.uint8))
    with pytest.raises(ValueError, match=r"255..255, expected 0..1 \(1 on edges"):
        NYUDFolder(root, targets=("edge",))[0]
    savemat(root / "segmentation/0001.mat", {"segmentation": np.full((8, 8), 77)})
    with pytest.raises(ValueError, match="values 77..77, expected"):
        NYUDFolder(root, targets=("semseg",))[0]
    (root / "segmentation/0001.mat").write_bytes(b"")
    with pytest.raises(ValueError, match="0001.mat: cannot be read"):
        NYUDFolder(root, targets=("semseg",))[0]
    (root / "images/0001.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="0001.jpg: does not decode"):
        NYUDFolder(root, targets=())[0]


def test_scenes_are_consistent():
    """Depth, normals and classes come from one geometry."""
    scene = draw_scene(np.random.default_rng(1), size=(60, 80), gaps=0.0)
    np.testing.assert_allclose(np.linalg.norm(scene.normals, axis=-1), 1, atol=1e-5)
    rows, columns = np.mgrid[0:60, 0:80] + 0.5
    rays = np.stack([(columns - 40) / 80, (30 - rows) / 80, np.full((60, 80), 0.6)], -1)
    assert (np.sum(rays * scene.normals, -1) < 1e-9).all()  # they face the camera
    points = rays / 0.6 * scene.depth[..., None]
    # Within a flat surface, neighbours differ by a step at right angles to the normal.
    flat = np.isin(scene.semseg, [1, 2, 3])
    step = points[:, 1:] - points[:, :-1]
    same = (scene.normals[:, 1:] == scene.normals[:, :-1]).all(-1)
    inner = flat[:, 1:] & flat[:, :-1] & same & (scene.edge[:, 1:] == 0)
    along = np.abs(np.sum(step * scene.normals[:, 1:], -1))[inner]
    assert inner.sum() > 500 and along.max() < 1e-3
    # Every change of class is an edge, and most of the picture is none.
    change = scene.semseg[:, 1:] != scene.semseg[:, :-1]
    assert (scene.edge[:, 1:][change] == 1).all() and change.any()
    assert 0.01 < scene.edge.mean() < 0.2


def test_scenes_depend_on_their_seed_and_have_gaps():
    one, same, other = (
        scenes(2, size=SIZE),
        scenes(2, size=SIZE),
        scenes(2, size=SIZE, seed=1),
    )
    np.testing.assert_array_equal(one.images, same.images)
    assert not np.array_equal(one.images, other.images)
    gap = one.targets["depth"] == 0
    assert 0.005 < gap.mean() < 0.08
    assert not one.targets["normals"][gap].any()


def test_dense_arrays_check_what_they_hold():
    images = np.zeros((2, 4, 5, 3), np.uint8)
    with pytest.raises(ValueError, match=r"depth: found shape \(2, 4, 4\)"):
        DenseArrays(images, {"depth": np.zeros((2, 4, 4))})
    with pytest.raises(ValueError, match="expected uint8"):
        DenseArrays(images.astype(float), {})
    with pytest.raises(ValueError, match="no example"):
        DenseArrays(images[:0], {})


@pytest.fixture
def bsds(tmp_path):
    """Two splits' worth of the published layout, one portrait among them."""
    from PIL import Image
    from scipy.io import savemat

    root = tmp_path / "BSDS500" / "data"
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        (root / "images" / split).mkdir(parents=True)
        (root / "groundTruth" / split).mkdir(parents=True)
        for n, size in enumerate(((6, 9), (9, 6))):
            pixels = rng.integers(0, 255, (*size, 3), np.uint8)
            Image.fromarray(pixels).save(root / "images" / split / f"{split}{n}.jpg")
            cells = np.empty((1, 4), object)
            for a in range(4):
                edge = np.zeros(size, np.uint8)
                edge[:, a:4] = 1
                cells[0, a] = {"Boundaries": edge, "Segmentation": edge}
            savemat(
                root / "groundTruth" / split / f"{split}{n}.mat", {"groundTruth": cells}
            )
    return root


def test_bsds_as_published(bsds, tmp_path):
    domain = load_bsds(tmp_path)
    assert (len(domain.train), len(domain.test)) == (4, 2)
    assert domain.validation is None
    apart = load_bsds(tmp_path, validation=True)
    parts = (apart.train, apart.validation, apart.test)
    for part, split in zip(parts, ("train", "val", "test"), strict=True):
        assert isinstance(part, BSDSFolder)
        assert [image.parent.name for image, _ in part.paths] == [split] * 2
    flat, turned = domain.test[0], domain.test[1]
    assert flat.image.shape == turned.image.shape == (6, 9, 3)
    np.testing.assert_allclose(flat.targets["edge"][0, :5], [0.25, 0.5, 0.75, 1, 0])
    annotators = flat.targets["annotators"]
    assert annotators.shape == (6, 9, 10) and (annotators[..., 4:] == 255).all()
    assert annotators[0, 0, :4].tolist() == [1, 0, 0, 0]
    portrait = BSDSFolder(bsds, ("test",), landscape=False)[1]
    np.testing.assert_array_equal(np.rot90(portrait.image), turned.image)


def test_bsds_says_what_is_missing(bsds, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_bsds(tmp_path / "absent")
    (bsds / "groundTruth/test/test0.mat").write_bytes(b"")
    with pytest.raises(ValueError, match="test0.mat: no BSDS500 truth"):
        load_bsds(bsds).test[0]
    (bsds / "groundTruth/test/test0.mat").unlink()
    with pytest.raises(FileNotFoundError, match="test0.mat: missing"):
        load_bsds(bsds)
    np.savez(tmp_path / "odd.npz", x_train=np.zeros(3))
    with pytest.raises(ValueError, match=r"odd.npz: found.*expected also"):
        load_bsds(tmp_path / "odd.npz")
    arrays = {
        f"x_{s}": np.zeros((1, 4, 6, 3), np.uint8) for s in ("train", "val", "test")
    }
    shares = {k.replace("x", "edge", 1): np.ones((1, 4, 6, 1)) for k in arrays}
    np.savez(tmp_path / "odd.npz", **arrays, **shares)
    with pytest.raises(ValueError, match="odd.npz: .*found float64, expected uint8"):
        load_bsds(tmp_path / "odd.npz")


@pytest.mark.data
def test_bsds_as_arrays(data_dir):
    domain = load_bsds(data_dir / "domains/bsds500_edges_80x120.npz")
    assert (len(domain.train), len(domain.test)) == (300, 200)
    apart = load_bsds(data_dir / "domains/bsds500_edges_80x120.npz", validation=True)
    assert apart.validation is not None
    assert (len(apart.train), len(apart.validation)) == (200, 100)
    edge = domain.test[0].targets["edge"]
    assert edge.shape == (80, 120) and edge.dtype == np.float32 and edge.max() <= 1
