"""Tasks that are no classification: dense targets, other losses, other metrics."""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftn_jax.adapt import Adaptation, Evaluator, Recipe
from ftn_jax.apply import from_linen
from ftn_jax.data import (
    Compose,
    DenseExample,
    Domain,
    Normalize,
    digest,
    eval_batches,
    split,
    train_batches,
)
from ftn_jax.measure import CLASSIFICATION, Measure, mean_score
from ftn_jax.method import Backbone, Layers, Method
from ftn_jax.nodes import Replace
from ftn_jax.presets import feature_extractor
from ftn_jax.results import Results
from ftn_jax.sweep import Contender, sweep


class Scenes:
    """Grey level as the target of a random picture."""

    def __init__(self, n=12, size=6, seed=0):
        rng = np.random.default_rng(seed)
        self.images = rng.integers(0, 256, (n, size, size, 3), np.uint8)
        self.labels = np.zeros(n, np.int32)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.images[index]
        return DenseExample(image, {"grey": image.mean(-1, dtype=np.float32) / 255})


class PerPixel(nn.Module):
    features: int = 1

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (1, 1), name="conv")(x)
        return nn.Conv(self.features, (1, 1), name="out")(x)


def squares(outputs, batch):
    error = (outputs[..., 0] - batch["grey"]) ** 2 * batch["mask"][:, None, None]
    count = batch["mask"].sum() * error[0].size
    return {"loss": error.sum(), "count": count}


GREY = Measure(
    loss=squares,
    collect=squares,
    score=mean_score,
    metric="loss",
    higher_is_better=False,
    percent=False,
)
LAYERS = Layers(kernels="conv/kernel", norms=None, head="out/(kernel|bias)")


@pytest.fixture(scope="module")
def backbone():
    params = PerPixel().init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))["params"]
    return Backbone(lambda n: from_linen(PerPixel(n)), params, {}, LAYERS)


def test_batches_of_dense_examples_hold_their_targets():
    source, stack = Scenes(), {"batch_size": 5, "transform": Normalize()}
    batch = next(train_batches(source, seed=0, **stack))
    np.testing.assert_allclose(batch["image"].mean(-1), batch["grey"], atol=1e-6)
    *_, last = eval_batches(source, **stack)
    assert last["grey"].shape == (5, 6, 6) and last["mask"].tolist() == [1, 1, 0, 0, 0]
    np.testing.assert_array_equal(last["grey"][0], last["grey"][2])


def test_the_steps_before_the_last_see_image_and_targets():
    def mirror(rng, item):
        return {name: x[:, ::-1] for name, x in item.items()}

    def stream(*steps):
        transform = Compose((*steps, Normalize()))
        return next(eval_batches(Scenes(), batch_size=4, transform=transform))

    plain, mirrored = stream(), stream(mirror)
    for name in ("image", "grey"):
        np.testing.assert_array_equal(mirrored[name], plain[name][:, :, ::-1])
        assert not np.array_equal(mirrored[name], plain[name])


def test_targets_of_different_sizes_are_refused():
    source = Scenes()

    def cut(rng, item):
        height = 5 if item["image"][0, 0, 0] % 2 else 6
        return item | {"grey": item["grey"][:height]}

    with pytest.raises(ValueError, match="the greys of a batch have different shapes"):
        next(eval_batches(source, batch_size=12, transform=cut))


def test_digest_sees_targets_and_splits_need_no_classes():
    class Changed(Scenes):
        def __getitem__(self, index):
            example = super().__getitem__(index)
            return example._replace(targets={"grey": example.targets["grey"] + 1})

    assert digest(Scenes()) == digest(Scenes()) != digest(Changed())
    parts = split(Scenes(), 0.25, seed=0)
    assert (len(parts.train), len(parts.validation)) == (9, 3)


def test_a_dense_task_trains_and_is_judged_by_its_own_measure(backbone):
    source = Scenes()
    adaptation = Adaptation(
        backbone,
        feature_extractor(LAYERS, classes=1),
        Recipe(epochs=40, batch_size=4, rates={"head": 0.1}),
        source,
        transform=Normalize(),
        measure=GREY,
    )
    evaluator = Evaluator(
        backbone, classes=1, transform=Normalize(), batch_size=5, measure=GREY
    )
    start = evaluator.score(adaptation.start(0).task, source)
    task = adaptation.run(0).task
    scores, hashed = evaluator.test(task, source)
    assert scores == evaluator.score(task, source) and scores["loss"] > 0
    assert scores["loss"] < start["loss"] / 3
    outputs = evaluator.outputs(task, source)
    assert outputs.shape == (12, 6, 6, 1)
    grey = np.stack([source[i].targets["grey"] for i in range(12)])
    expected = np.mean((outputs[..., 0] - grey) ** 2)
    np.testing.assert_allclose(scores["loss"], expected, rtol=1e-5)
    again = evaluator.test(task, source).outputs_sha256
    assert again == hashed != evaluator.test(task, Scenes(seed=1)).outputs_sha256


def test_a_sweep_reports_the_measures_number(backbone, tmp_path):
    domain = Domain("grey", ("grey",), Scenes(), Scenes(seed=1))
    results = Results(tmp_path, experiment="grey", config={})
    contender = Contender(_head_only, [{"head": 1e-6}, {"head": 0.1}, {"head": 1e-7}])
    sweep(
        backbone,
        [domain],
        {"head": contender},
        results=results,
        recipe=Recipe(epochs=20, batch_size=4, rates={}),
        train_transform=Normalize(),
        eval_transform=Normalize(),
        validation=0.3,
        measures={"grey": GREY},
        workdir=tmp_path,
    )
    (row,) = results.rows
    assert row.metric == "loss" and 0 < row.value < 1
    assert row.details["rates"] == {"head": 0.1}  # the smaller loss, not the larger


def _head_only(classes):
    return Method({LAYERS.head: partial(Replace.init, group="head")}, classes)


def test_better_knows_the_direction_and_puts_nan_last():
    def better(measure, new, old):
        return measure.better({measure.metric: new}, {measure.metric: old})

    assert better(CLASSIFICATION, 0.9, 0.8) and not better(CLASSIFICATION, 0.8, 0.9)
    assert better(GREY, 0.1, 0.2) and not better(GREY, 0.2, 0.1)
    assert better(GREY, 0.5, math.nan) and not better(GREY, math.nan, 0.5)
    tie = {"accuracy": 0.5}
    assert CLASSIFICATION.better(tie | {"loss": 1.0}, tie | {"loss": 2.0})
    assert CLASSIFICATION.show(0.5) == " 50.0 %" and GREY.show(0.5) == "  0.500"


def test_a_layout_with_a_decoder_makes_its_own_head(backbone):
    def new_head(classes):
        return {"(conv|out)/.*": classes}

    layers = LAYERS._replace(new_head=new_head)
    assert feature_extractor(layers, classes=3).rules == {"(conv|out)/.*": 3}
    assert [*feature_extractor(LAYERS, classes=3).rules] == [LAYERS.head]
