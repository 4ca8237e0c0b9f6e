"""Pretrain a class-conditional generator: hinge loss, spectral norm, averages."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, Key

from ftn_jax.metrics import Sums
from ftn_jax.models.biggan import BigGAN
from ftn_jax.models.biggan_discriminator import BigGANDiscriminator
from ftn_jax.models.spectral import normalize, start_vectors
from ftn_jax.node import register


class Player(NamedTuple):
    """One of the two networks in training.

    Attributes:
        weights: before spectral normalization.
        vectors: of the power iteration.
        opt_state: of its optimizer.
    """

    weights: Any
    vectors: Any
    opt_state: Any


@dataclass(frozen=True)
class GanState:
    """Both players, the generator's average, and what the next step needs.

    Attributes:
        step: generator steps taken.
        generator: the generator.
        discriminator: the discriminator.
        average: exponential moving average of the generator's weights.
        batch_stats: the generator's running statistics.
        key: source of latent vectors.
        finite: whether every step so far was.
    """

    step: Int[Array, ""]
    generator: Player
    discriminator: Player
    average: Any
    batch_stats: Any
    key: Key[Array, ""]
    finite: Bool[Array, ""]


register(
    GanState,
    (
        "step",
        "generator",
        "discriminator",
        "average",
        "batch_stats",
        "key",
        "finite",
    ),
    (),
)


class Finished(NamedTuple):
    """A pretrained generator, its spectral normalization folded into the kernels."""

    params: Any
    batch_stats: Any


class Gan:
    """A generator and a discriminator, and how they train each other.

    One step updates the discriminator `d_steps` times, each on its own part of the
    batch, and the generator once. `jax.jit(gan.step, donate_argnums=1)` it and loop in
    Python: on a CPU, convolutions in a `lax` loop run on a slow path.

    Source: Brock et al. (2019), section 3 and Appendix C; hinge loss of Lim and Ye,
    "Geometric GAN" (2017).
    """

    def __init__(
        self,
        generator: BigGAN,
        discriminator: BigGANDiscriminator,
        *,
        rates: tuple[float, float] = (1e-4, 4e-4),
        d_steps: int = 2,
        averaging: float = 0.999,
    ) -> None:
        """Name the players.

        Args:
            generator: draws images.
            discriminator: scores them.
            rates: Adam's (beta 0, 0.999) of generator and discriminator.
            d_steps: discriminator steps for each of the generator's.
            averaging: share of the generator's average that stays in a step.

        Raises:
            ValueError: if the players know different classes.
        """
        if generator.num_classes != discriminator.num_classes:
            raise ValueError(
                f"the generator has {generator.num_classes} classes and the "
                f"discriminator {discriminator.num_classes}"
            )
        self.generator, self.discriminator = generator, discriminator
        self.d_steps, self.averaging = d_steps, averaging
        self._tx = [optax.adam(rate, b1=0.0, b2=0.999, eps=1e-6) for rate in rates]

    def start(self, key: Key[Array, ""]) -> GanState:
        """Draw both players' first weights."""
        keys = jax.random.split(key, 5)
        size, y = self.generator.resolution, jnp.zeros((1,), jnp.int32)
        z = jnp.zeros((1, self.generator.dim_z))
        g = jax.jit(self.generator.init)(keys[0], z, y)
        x = jnp.zeros((1, size, size, 3))
        d = jax.jit(self.discriminator.init)(keys[1], x, y)
        g_vectors = start_vectors(keys[2], g["params"])
        d_vectors = start_vectors(
            keys[3], d["params"], where=lambda p: p.endswith(("kernel", "embedding"))
        )
        g_tx, d_tx = self._tx
        return GanState(
            jnp.zeros((), jnp.int32),
            Player(g["params"], g_vectors, g_tx.init(g["params"])),
            Player(d["params"], d_vectors, d_tx.init(d["params"])),
            jax.tree.map(jnp.copy, g["params"]),
            g["batch_stats"],
            keys[4],
            jnp.ones((), bool),
        )

    def step(
        self, shared: None, state: GanState, batch: Mapping[str, Any]
    ) -> tuple[GanState, Sums]:
        """Train both players on `d_steps` equal parts of a batch of real images.

        A `ftn_jax.train.TrainStep`, so that `ftn_jax.fit.fit` can run it.

        Args:
            shared: nothing is frozen here.
            state: may be donated.
            batch: `"image"` between -1 and 1, and `"label"`.

        Returns:
            The next state (the same one, if a loss is not finite), and `"d_loss"` and
            `"g_loss"` times the `"count"` of images.

        Raises:
            ValueError: at trace time, if the batch has no `d_steps` equal parts.
        """
        images, labels = batch["image"], batch["label"]
        if len(images) % self.d_steps:
            raise ValueError(
                f"a batch of {len(images)} images has no {self.d_steps} equal parts"
            )
        key = jax.random.fold_in(state.key, state.step)
        keys = jax.random.split(key, 1 + self.d_steps)
        d, losses = state.discriminator, []
        drawing = normalize(state.generator.weights, state.generator.vectors).params
        parts = [jnp.split(x, self.d_steps) for x in (images, labels)]
        for x, y, key in zip(*parts, keys[1:], strict=True):
            fake, _ = self._draw(drawing, state.batch_stats, key, y)
            loss, d = self._train_discriminator(d, x, fake, y)
            losses.append(loss)
        y = parts[1][0]
        g_loss, g, stats = self._train_generator(
            state.generator, d, state.batch_stats, keys[0], y
        )
        keep = jnp.minimum(self.averaging, (1.0 + state.step) / (10.0 + state.step))
        average = jax.tree.map(
            lambda a, w: keep * a + (1 - keep) * w, state.average, g.weights
        )
        d_loss = sum(losses) / len(losses)
        finite = jnp.isfinite(d_loss) & jnp.isfinite(g_loss) & state.finite
        new = GanState(state.step + 1, g, d, average, stats, state.key, finite)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        count = jnp.float32(len(images))
        return replace(new, finite=finite), {
            "d_loss": d_loss * count,
            "g_loss": g_loss * count,
            "count": count,
            "nonfinite": 1.0 - finite,
        }

    def _draw(self, params: Any, stats: Any, key: Any, y: Any) -> tuple[Any, Any]:
        z = jax.random.normal(key, (len(y), self.generator.dim_z))
        variables = {"params": params, "batch_stats": stats}
        images, mutated = self.generator.apply(
            variables, z, y, train=True, mutable=["batch_stats"]
        )
        return images, mutated["batch_stats"]

    def _train_discriminator(
        self, player: Player, real: Any, fake: Any, y: Any
    ) -> tuple[Any, Player]:
        images, labels = jnp.concatenate([real, fake]), jnp.concatenate([y, y])

        def objective(weights: Any) -> tuple[Any, Any]:
            params, vectors = normalize(weights, player.vectors)
            scores: Any = self.discriminator.apply({"params": params}, images, labels)
            on_real, on_fake = jnp.split(scores, 2)
            too_low, too_high = jax.nn.relu(1 - on_real), jax.nn.relu(1 + on_fake)
            return jnp.mean(too_low) + jnp.mean(too_high), (vectors, None)

        loss, player, _ = _descend(objective, player, self._tx[1])
        return loss, player

    def _train_generator(
        self, player: Player, judge: Player, stats: Any, key: Any, y: Any
    ) -> tuple[Any, Player, Any]:
        judging = normalize(judge.weights, judge.vectors).params

        def objective(weights: Any) -> tuple[Any, Any]:
            params, vectors = normalize(weights, player.vectors)
            fake, new_stats = self._draw(params, stats, key, y)
            scores: Any = self.discriminator.apply({"params": judging}, fake, y)
            return -jnp.mean(scores), (vectors, new_stats)

        return _descend(objective, player, self._tx[0])

    def finish(
        self, state: GanState, *, batches: int = 16, batch_size: int = 64
    ) -> Finished:
        """Fold the average's spectral norm and measure its own running statistics.

        The statistics of training belong to weights that changed meanwhile; these are
        means over fresh batches of random classes.

        Args:
            state: of a trained pair.
            batches: how many batches the statistics are measured on.
            batch_size: images in each.
        """
        params = normalize(state.average, state.generator.vectors, steps=20).params
        measuring = self.generator.clone(bn_momentum=0.0)

        @jax.jit
        def measure(key: Any) -> Any:
            z_key, y_key = jax.random.split(key)
            z = jax.random.normal(z_key, (batch_size, measuring.dim_z))
            y = jax.random.randint(y_key, (batch_size,), 0, measuring.num_classes)
            variables = {"params": params, "batch_stats": state.batch_stats}
            _, seen = measuring.apply(
                variables, z, y, train=True, mutable=["batch_stats"]
            )
            return seen["batch_stats"]

        keys = jax.random.split(jax.random.fold_in(state.key, state.step), batches)
        seen = [measure(key) for key in keys]
        stats = jax.tree.map(lambda *x: sum(x) / len(x), *seen)
        return Finished(params, stats)


def _descend(
    objective: Callable[[Any], tuple[Any, Any]],
    player: Player,
    tx: optax.GradientTransformation,
) -> tuple[Any, Player, Any]:
    """Take one step down; the objective also gives new vectors and something else."""
    (loss, (vectors, other)), grads = jax.value_and_grad(objective, has_aux=True)(
        player.weights
    )
    updates, opt_state = tx.update(grads, player.opt_state, player.weights)
    weights = optax.apply_updates(player.weights, updates)
    return loss, Player(weights, vectors, opt_state), other
