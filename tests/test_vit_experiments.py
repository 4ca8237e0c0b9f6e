"""The transformer tables, as a user with checkpoint files and folders sees them."""

import importlib
import json
from functools import partial

import jax
import numpy as np
import pytest
from pretrained.vit_checkpoints import CLIP, hf_clip, openai_clip
from safetensors.numpy import save_file

import ftn_jax.adapt
import ftn_jax.vit_table
from ftn_jax import restore_task
from ftn_jax.models import vit_tiny_cifar
from ftn_jax.pretrained import load_vit
from ftn_jax.step_cost import interleave, measured_costs

pytestmark = pytest.mark.long

CLASSES = {"cifar10": 3, "dtd": 2}


def load(name):
    return importlib.import_module(f"experiments.{name}")


def clip(classes, *, image_px, feature_norm):
    """A small one of CLIP's form, under its name."""
    return CLIP.clone(num_classes=classes, image_px=image_px, feature_norm=feature_norm)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint in each layout; domains as arrays and as images; embeddings."""
    from PIL import Image

    root = tmp_path_factory.mktemp("clip")
    for convert in (dict, openai_clip):
        weights = {k: np.ascontiguousarray(w) for k, w in convert(hf_clip()).items()}
        save_file(weights, root / f"{convert.__name__}.safetensors")
    rng = np.random.default_rng(0)
    (root / "data").mkdir()
    (root / "embeddings").mkdir()
    arrays = {}
    for part, n in (("train", 30), ("test", 24)):
        arrays[f"y_{part}"] = np.arange(n) % 3
        patches = rng.integers(0, 2, (n, 3, 3, 3)).astype(np.uint8)
        arrays[f"x_{part}"] = 255 * patches.repeat(4, 1).repeat(4, 2)
        for label in ("woven", "dotted"):
            folder = root / "data" / "dtd" / part / label
            folder.mkdir(parents=True)
            for i in range(n // 3):
                pixels = rng.integers(0, 255, (16, 14, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    np.savez(root / "data" / "cifar10.npz", **arrays)
    lines = ["emotion,pixels,Usage"]
    for usage in ("Training", "PublicTest", "PrivateTest"):
        for n in range(14):
            pixels = " ".join(map(str, rng.integers(0, 255, 48 * 48)))
            lines.append(f"{n % 7},{pixels},{usage}")
    (root / "data" / "fer2013.csv").write_text("\n".join(lines))
    for name, n in CLASSES.items():
        rows = rng.normal(size=(n, 7)).astype(np.float32)
        np.savez(root / "embeddings" / f"{name}.npz", embeddings=rows)
    return root


def config(files, workdir, **options):
    module = load("clip_transfer")
    settings = {
        "weights": str(files / "dict.safetensors"),
        "data": files / "data",
        "backbone": "clip_vit_b32",
        "image_px": 12,
        "batch_size": 8,
        "workdir": workdir,
    }
    return module.Config(**settings | {"epochs": 1, "rates": (1e-2,)} | options)


@pytest.fixture
def module(monkeypatch):
    module = load("clip_transfer")
    monkeypatch.setitem(module.VITS, "clip_vit_b32", clip)
    return module


def test_the_full_table_from_files(files, module, tmp_path, capsys):
    cfg = config(
        files,
        tmp_path,
        domains=("cifar10", "dtd"),
        methods=("ftn_o",),
        embeddings=files / "embeddings",
        feature_norm=True,
        shots=5,
    )
    rows = module.main(cfg).rows
    assert [r.task for r in rows] == ["cifar10", "dtd"]
    # Five of each class, less the fifth that would choose the rate.
    assert [r.details["train_examples"] for r in rows] == [12, 8]
    assert rows[0].by_group == {"head": 3 * 7 + 3, "factors": 2 * 4 * (12 + 3 + 4)}
    table = (tmp_path / "results.md").read_text()
    assert table in capsys.readouterr().out
    head, _, line = table.splitlines()
    assert "| GFLOPs per step | s per epoch | cifar10 | dtd | mean |" in head
    flops, seconds = (float(line.split("|")[n]) for n in (4, 5))
    costs = json.loads((tmp_path / "costs.json").read_text())
    assert costs["FTN O"][0] == pytest.approx(1e9 * flops, abs=1e7)
    assert seconds == pytest.approx(1.5 * costs["FTN O"][1], abs=0.01)
    # The BatchNorm before the head has the task's own statistics.
    saved = restore_task(
        tmp_path / "tasks/dtd/ftn_o/seed0", module.load_backbone(cfg).shared
    )
    mean = saved.task.model_state["batch_stats"]["feature_bn"]["mean"]
    assert mean.shape == (7,) and np.abs(mean).max() > 0


def test_a_head_that_does_not_move_is_the_zero_shot_classifier(files, module, tmp_path):
    """From OpenAI's layout, the same classes as by hand from the other."""
    cfg = config(
        files,
        tmp_path,
        weights=str(files / "openai_clip.safetensors"),
        domains=("cifar10",),
        methods=("linear_probe",),
        embeddings=tmp_path,
        rates=(1e-12,),
    )
    found = np.load(files / "data" / "cifar10.npz")
    transform = module.transform(cfg)
    images = np.stack([transform(np.random.default_rng(0), x) for x in found["x_test"]])
    params = load_vit(hf_clip(), CLIP).params
    features = np.asarray(jax.jit(CLIP.apply)({"params": params}, images))
    # Texts across what all pictures have in common: random networks see little else.
    mean = features.mean(0)
    texts = features[:3] - np.outer(features[:3] @ mean, mean) / (mean @ mean)
    np.savez(tmp_path / "cifar10.npz", texts)
    (row,) = module.main(cfg).rows
    chosen = (
        features @ (texts / np.linalg.norm(texts, axis=1, keepdims=True)).T
    ).argmax(1)
    assert row.value == pytest.approx((chosen == found["y_test"]).mean())
    assert len({*chosen.tolist()}) == 3


def test_domains_are_found_in_every_form(files, module, tmp_path):
    domains = {d.name: d for d in module.load_domains(config(files, tmp_path))}
    assert {k: d.num_classes for k, d in domains.items()} == {
        "cifar10": 3,
        "dtd": 2,
        "fer2013": 7,
    }
    few = module.load_domains(config(files, tmp_path, shots=1))
    assert [len(d.train) for d in few] == [3, 2, 7]


def test_what_is_missing_is_named(files, module, tmp_path):
    with pytest.raises(ValueError, match="clip_vit_b64: unknown, known are"):
        module.main(config(files, tmp_path, backbone="clip_vit_b64"))
    with pytest.raises(FileNotFoundError, match="nowhere/cifar10.npz"):
        module.main(
            config(files, tmp_path, methods=("ftn_o",), embeddings=tmp_path / "nowhere")
        )


@pytest.mark.slow
def test_the_full_size_network_takes_a_step(files, tmp_path, monkeypatch):
    """CLIP ViT-B/32 at 224 px, its checkpoint as Hugging Face saves it."""
    # Not 256 images a step to look at eight, nor eight rounds of timing.
    module = ftn_jax.vit_table
    monkeypatch.setattr(module, "sweep", partial(module.sweep, eval_batch_size=8))
    monkeypatch.setattr(module, "measured_costs", partial(measured_costs, rounds=1))
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = transformers.CLIPVisionConfig()  # B/32
    net = transformers.CLIPVisionModelWithProjection(settings)
    net.save_pretrained(tmp_path / "hf")
    (weights,) = (tmp_path / "hf").glob("*.safetensors")
    cfg = load("clip_transfer").Config(
        weights=str(weights),
        data=files / "data",
        domains=("dtd",),
        methods=("ftn_o", "ftn_qv"),
        epochs=1,
        batch_size=4,
        max_train=10,
        max_test=8,
        rates=(1e-3,),
        workdir=tmp_path / "runs",
    )
    rows = load("clip_transfer").main(cfg).rows
    assert {r.method: r.task_params for r in rows} == {
        "FTN O": 40_512,
        "FTN Q+V": 81_024,
    }
    assert {r.shared_params for r in rows} == {87_849_216}


def test_a_backbone_is_trained_once_and_with_its_recipe(tmp_path, monkeypatch):
    module = load("vit_transfer")
    cfg = module.Config(
        workdir=tmp_path,
        image_px=8,
        patch_px=4,
        width=12,
        depth=1,
        pretrain_epochs=2,
        pretrain_limit=64,
        max_test=32,
    )
    first = module.load_backbone(cfg)
    init = jax.jit(module.build(cfg, 26).init)
    start = init(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), first.shared, start["params"]
    )
    assert min(jax.tree.leaves(moved)) > 0

    def never(*args, **options):
        raise AssertionError("a trained backbone was trained again")

    monkeypatch.setattr(ftn_jax.adapt.Adaptation, "run", never)
    jax.tree.map(
        np.testing.assert_array_equal, module.load_backbone(cfg).shared, first.shared
    )
    other = module.Config(**{**vars(cfg), "pretrain_rate": 2e-3})
    with pytest.raises(AssertionError, match="trained again"):
        module.load_backbone(other)


def test_rows_are_timed_together(tmp_path, monkeypatch):
    order = []
    rows = {name: partial(order.append, name) for name in "ab"}
    times = interleave(rows, rounds=2, steps=2)
    assert "".join(order) == 3 * "aabb" and [len(t) for t in times.values()] == [2, 2]

    class Step:
        flops = 5.0

        def __init__(self, name):
            order.append(name)

        def __call__(self):
            return None

    order.clear()
    steps = {name: partial(Step, name) for name in "ab"}
    path = tmp_path / "costs.json"
    first = measured_costs(path, steps, rounds=1)
    assert first["a"].flops == 5 and first["a"].seconds > 0
    assert measured_costs(path, steps) == first and order == ["a", "b"]
    measured_costs(path, steps | {"c": partial(Step, "c")}, rounds=1)
    assert order == ["a", "b", "a", "b", "c"]


@pytest.mark.slow
def test_speed_of_a_vit_has_its_own_floor(tmp_path, monkeypatch):
    module = load("speed")
    small = partial(vit_tiny_cifar, width=48, depth=1)
    monkeypatch.setitem(module.VITS, "vit_tiny_cifar", small)
    cfg = module.Config.tiny()
    cfg = module.Config(
        **{**vars(cfg), "backbone": "vit_tiny_cifar", "workdir": tmp_path}
    )
    module.main(cfg)
    result = json.loads((tmp_path / "speed.json").read_text())
    rows = {r["row"]: r for r in result["rows"]}
    floor = rows["head + output biases"]
    assert floor["times_floor"] == 1 and floor["params"] == 48
    assert rows["head only"]["flops"] < floor["flops"]
    for name in ("FTN O", "FTN Q+V", "LoRA"):
        beside, merged = (rows[f"{name}, {w}"] for w in ("factored", "materialized"))
        assert floor["flops"] < beside["flops"] < merged["flops"]
        assert beside["params"] == merged["params"]
    assert merged["flops"] < rows["fine-tuning"]["flops"]
