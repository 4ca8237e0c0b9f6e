"""The papers' presets: what each experiment reads, transforms, decays and prints."""

import importlib
from dataclasses import replace

import numpy as np
import pytest

from ftn_jax.data import ArraySource, Domain, describe
from ftn_jax.decathlon import DECAY
from ftn_jax.results import Row


def load(name):
    return importlib.import_module(f"experiments.{name}")


def steps(transform):
    first, *rest = describe(transform)
    assert first["step"] == "ToRGB"
    return [step["step"] for step in rest]


def test_sketch_sets_have_the_protocols_transforms():
    module = load("imagenet_to_sketch")
    cfg = module.Config()
    train, test = module.transforms(cfg, "flowers")
    assert steps(train) == ["RandomResizedCrop", "Flip", "Normalize"]
    assert steps(test) == ["ResizeShort", "CenterCrop", "Normalize"]
    assert describe(test)[1]["size"] == 224
    as_piggyback = replace(cfg, test_resize=256, train_resize=256)
    train, test = module.transforms(as_piggyback, "wikiart")
    assert steps(train)[0] == "ResizeShort" and describe(test)[1]["size"] == 256
    for name in ("cubs_cropped", "stanford_cars_cropped", "cub"):
        train, test = module.transforms(cfg, name)
        assert steps(train) == ["Resize", "Flip", "Normalize"]
        assert steps(test) == ["Resize", "Normalize"]


def test_presets_are_the_papers():
    sketch, domainnet, decathlon = (
        load(name).Config() for name in ("imagenet_to_sketch", "domainnet", "decathlon")
    )
    assert (sketch.backbone, sketch.ranks) == ("resnet50", (1, 5, 10, 15, 20, 25, 50))
    assert (sketch.factor_rates, sketch.ftn_rate, sketch.baseline_decay) == (
        (5e-3,),
        8e-3,
        0.0,
    )
    assert (domainnet.backbone, domainnet.ranks) == ("resnet34", (1, 5, 10, 20, 30, 40))
    assert (domainnet.ftn_rate, domainnet.baseline_decay) == (5e-3, 1e-4)
    for cfg in (sketch, domainnet):
        assert (cfg.epochs, cfg.batch_size, cfg.image_px) == (30, 32, 224)
        assert cfg.inits == ("xavier",) and cfg.select == "last"
    assert (decathlon.backbone, decathlon.epochs, decathlon.batch_size) == (
        "resnet26",
        120,
        128,
    )
    assert decathlon.schedule == "steps" and len(decathlon.domains) == 9


def test_decathlon_rows_and_their_decay():
    module = load("decathlon")
    cfg = replace(
        module.Config(),
        backbone="cifar_resnet8",
        image_px=16,
        methods=("bn_head", "ftn", "parallel_adapters"),
        ranks=(2,),
    )
    rows = module.contenders(cfg, load("multi_domain").load_backbone(cfg))
    assert [*rows] == [
        "BN + head",
        "FTN R=2, xavier",
        "parallel adapters",
        "parallel adapters, early",
        "parallel adapters, mid",
        "parallel adapters, late",
        "parallel adapters, half",
        "parallel adapters, dropout 0.5",
        "parallel adapters, SVD 0.5",
    ]
    for name, row in rows.items():
        trained = {*row.rates[0]} - {"factors"}
        assert row.weight_decay("dtd") == dict.fromkeys(trained, 2e-3), name
        assert row.weight_decay("svhn") == dict.fromkeys(trained, 1e-4), name
        assert row.weight_decay("flowers5") == dict.fromkeys(trained, 5e-4), name
    assert rows["FTN R=2, xavier"].details == {"rank": 2}
    plain = replace(cfg, decay_by_set=False, placements=(), dropouts=(), svd_ranks=())
    rows = module.contenders(plain, load("multi_domain").load_backbone(cfg))
    assert rows["parallel adapters"].weight_decay == {"adapters": 5e-4}
    assert rows["FTN R=2, xavier"].weight_decay == {}


def test_decathlon_images_are_normalized_by_their_own():
    module = load("decathlon")
    rng = np.random.default_rng(0)
    images = rng.integers(40, 90, (20, 80, 72, 3)).astype(np.uint8)
    source = ArraySource(images, np.arange(20) % 2)
    for name, size in (("dtd", 64), ("gtsrb", 72)):
        domain = Domain(name, ("a", "b"), source, source)
        for transform in module.transforms(module.Config(), domain):
            seen = np.stack([transform(rng, image) for image in images])
            assert seen.shape == (20, size, size, 3)
            assert abs(seen.mean()) < 0.05 and abs(seen.std() - 1) < 0.05


def test_scores_of_whole_rows_beside_the_printed_ones():
    module = load("decathlon")

    def row(method, task, value):
        return Row(
            *(method, task, 0, "accuracy", value, 1, 2, 3, 4.0, {}, {}, "x", "", "")
        )

    nine = [name for name in DECAY if name != "imagenet12"]
    rows = [row("parallel adapters", name, 1.0) for name in nine]
    rows += [row("FTN R=1", name, 0.9) for name in nine[:-1]]
    lines = module.score_table(rows).splitlines()
    assert lines[2] == "| parallel adapters | 9 | 9000 | 3156 |"
    assert lines[3] == "| FTN R=1 | 8 | – | – |"


@pytest.mark.parametrize("name", ["imagenet_to_sketch", "domainnet", "decathlon"])
def test_absent_data_is_named(name, tmp_path):
    module = load(name)
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        module.load(replace(module.Config(), data=tmp_path))
