"""Joint training: a step by hand, heads of one's own, and what is kept."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ftn_jax.joint
from ftn_jax import make_delta, materialize
from ftn_jax.apply import from_linen
from ftn_jax.data import ArraySource, Domain, Normalize, train_batches
from ftn_jax.joint import JointRecipe, joint_batches, joint_epoch, train_joint
from ftn_jax.method import Backbone
from ftn_jax.presets import RESNET, fine_tuning
from ftn_jax.resume import StateFolder

pytestmark = pytest.mark.long

TRANSFORM = Normalize((0.5,) * 3, (0.25,) * 3)


class Net(nn.Module):
    """A convolution, a BatchNorm, a head of any size."""

    classes: int = 5

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), name="conv", use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="bn")(x)
        return nn.Dense(self.classes, name="head")(nn.relu(x).mean(axis=(1, 2)))


def domain(name, classes, n, seed):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    images = rng.integers(0, 255, (n, 6, 6, 3)).astype(np.uint8)
    source = ArraySource(images, labels)
    return Domain(name, tuple(map(str, range(classes))), source, source)


@pytest.fixture(scope="module")
def backbone():
    variables = Net().init(jax.random.key(0), jnp.zeros((1, 6, 6, 3)))
    return Backbone(
        lambda classes: from_linen(Net(classes)),
        variables["params"],
        {"batch_stats": variables["batch_stats"]},
        RESNET,
    )


DOMAINS = [domain("a", 2, 4, 0), domain("b", 3, 9, 1)]


def test_one_step_by_hand(backbone, tmp_path):
    """Gradients of the mean losses add up; running statistics go from one to the next.

    Both domains' softmax runs over their own outputs.
    """
    end = train_joint(
        backbone,
        DOMAINS,
        JointRecipe(epochs=1, batch_size=4, rate=0.5),
        transform=TRANSFORM,
        seed=3,
        folder=StateFolder(tmp_path),
    ).backbone
    key, _ = jax.random.split(jax.random.key(3))
    method = fine_tuning(RESNET, classes=5)
    delta = make_delta(key, backbone.shared, method.rules_for(backbone.shared))
    params, stats = (
        materialize(backbone.shared, delta),
        backbone.model_state["batch_stats"],
    )
    assert params["head"]["kernel"].shape == (4, 5)

    def loss(params, stats, batch, first, last):
        logits, new = Net(5).apply(
            {"params": params, "batch_stats": stats},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits[:, first:last], batch["label"]
        )
        return losses.mean(), new["batch_stats"]

    total = jax.tree.map(jnp.zeros_like, params)
    for n, (first, last) in enumerate([(0, 2), (2, 5)]):
        stream = train_batches(
            DOMAINS[n].train, batch_size=4, transform=TRANSFORM, seed=2 * 3 + n
        )
        grads, stats = jax.grad(loss, has_aux=True)(
            params, stats, next(stream), first, last
        )
        total = jax.tree.map(jnp.add, total, grads)
    # Nesterov's first step is 1 + 0.9 gradients.
    expected = jax.tree.map(lambda w, g: w - 0.5 * 1.9 * g, params, total)
    for x, y, before in zip(
        *map(jax.tree.leaves, (end.shared, expected, params)), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
        assert np.abs(x - before).max() > 1e-3
    for x, y in zip(
        *map(jax.tree.leaves, (end.model_state["batch_stats"], stats)), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_a_domain_runs_with_its_own_outputs_and_no_run_is_repeated(
    backbone, tmp_path, monkeypatch
):
    options = dict(transform=TRANSFORM, seed=0, folder=StateFolder(tmp_path / "joint"))
    recipe = JointRecipe(epochs=2, batch_size=4, rate=0.1)
    joint = train_joint(backbone, DOMAINS, recipe, **options)
    image = TRANSFORM(np.random.default_rng(0), DOMAINS[0].train.images)
    all_outputs, _ = joint.backbone.network(5)(
        joint.backbone.shared,
        joint.backbone.model_state,
        {"image": image},
        train=False,
        key=None,
    )
    for name, classes, part in (("a", 2, slice(0, 2)), ("b", 3, slice(2, 5))):
        task = joint.tasks[name]
        own, _ = joint.backbone.network(classes)(
            materialize(joint.backbone.shared, task.delta),
            task.model_state,
            {"image": image},
            train=False,
            key=None,
        )
        np.testing.assert_allclose(own, all_outputs[:, part], rtol=1e-5, atol=1e-6)

    def never(*args, **options):
        raise AssertionError("the joint network was trained again")

    monkeypatch.setattr(ftn_jax.joint, "train_batches", never)
    again = train_joint(backbone, DOMAINS, recipe, **options)
    for x, y in zip(
        *map(jax.tree.leaves, (again.backbone.shared, joint.backbone.shared)),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)


def test_batches_take_turns_and_can_start_anywhere():
    sources = [d.train for d in DOMAINS]
    options = dict(batch_size=4, transform=TRANSFORM, classes=[2, 3], seed=1)
    assert joint_epoch(sources, batch_size=4) == 1
    stream = joint_batches(sources, **options)
    seen = [next(stream) for _ in range(5)]
    assert seen[0]["domain"].tolist() == [0, 1] * 4
    for batch in seen:
        assert batch["image"].shape == (8, 6, 6, 3)
        assert set(batch["label"][0::2]) <= {0, 1}
        assert set(batch["label"][1::2]) <= {2, 3, 4}
    later = next(joint_batches(sources, **options, start_step=3))
    for name, values in later.items():
        np.testing.assert_array_equal(values, seen[3][name])
    assert not np.array_equal(later["image"], seen[2]["image"])


@pytest.mark.parametrize(
    ("domains", "processes", "message"),
    [(1, 1, "two domains or more, got 1"), (2, 2, "in one process, found 2: start")],
)
def test_what_is_no_joint_training_is_refused(
    backbone, tmp_path, monkeypatch, domains, processes, message
):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    with pytest.raises(ValueError, match=message):
        train_joint(
            backbone,
            DOMAINS[:domains],
            JointRecipe(),
            transform=TRANSFORM,
            seed=0,
            folder=StateFolder(tmp_path),
        )
