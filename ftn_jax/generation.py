"""Fill a table: image domains by ways to adapt a generator to them."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from ftn_jax.apply import Apply, from_linen
from ftn_jax.checkpoint import fingerprint, save_task
from ftn_jax.command import progress_bar
from ftn_jax.core import Rules, count, materialize
from ftn_jax.invert import Drawer, Inversion, Inverted, Inverter, in_range
from ftn_jax.latents import beside, for_file, make_latents, tables
from ftn_jax.models import BigGAN
from ftn_jax.reconstruction import psnr
from ftn_jax.results import Results, Row
from ftn_jax.resume import StateFolder
from ftn_jax.sweep import slug
from ftn_jax.train import Task
from ftn_jax.trial import short_hash

HELD_OUT = " (held out)"
"""What follows a domain's name in the rows of its held-out images."""


class Generator(NamedTuple):
    """A frozen generator.

    Attributes:
        model: the module.
        params: its parameters.
        model_state: its running statistics.
    """

    model: BigGAN
    params: Any
    model_state: Any


class Images(NamedTuple):
    """A domain's images, of the generator's size."""

    name: str
    train: UInt8[np.ndarray, "n h w 3"]
    held_out: UInt8[np.ndarray, "m h w 3"]


class Contender(NamedTuple):
    """A row of the table.

    Attributes:
        rules: of the delta over the generator; `{}` for none.
        rates: Adam's, of latents and of the delta's groups, one mapping for each
            candidate. For each delta by itself, short runs choose among several: by
            the PSNR of training images.
        together: whether one delta serves all domains, trained on all of them.
    """

    rules: Rules
    rates: Sequence[Mapping[str, float]]
    together: bool = False


@dataclass(frozen=True)
class Start:
    """Where latents start.

    Attributes:
        z_std: standard deviation of the latent vectors; 0 starts at the mean.
        class_vectors: whether images have class vectors of their own, starting at the
            mean of the embedding.
        label: the class of all images, if not.
    """

    z_std: float = 1.0
    class_vectors: bool = False
    label: int = 0

    def tables(
        self, generator: Generator, n: int, *, seed: int
    ) -> dict[str, Float[Array, "n _"]]:
        """Make the tables for `n` images."""
        shape = n, generator.model.dim_z
        found = {"z": self.z_std * jax.random.normal(jax.random.key(seed), shape)}
        if self.class_vectors:
            mean = generator.params["embedding"]["embedding"].mean(axis=0)
            found["y"] = jnp.tile(mean, (n, 1))
        return found


def of_label(apply: Apply, label: int) -> Apply:
    """Run a generator on rows of latents; where they lack `y` it is one class."""

    def run(params: Any, model_state: Any, batch: Mapping[str, Any], **options: Any):
        y: Int[Array, " b"] = jnp.full(len(batch["z"]), label)
        return apply(params, model_state, {"y": y, **batch}, **options)

    return run


class Study:
    """A table: for each domain and contender, PSNR on training and held-out images.

    Held-out images are inverted with the adapted generator fixed. Every fitted set of
    images is a saved task, from which the pictures are drawn.
    """

    def __init__(
        self,
        generator: Generator,
        results: Results,
        recipe: Inversion,
        *,
        held_out: Inversion,
        start: Start,
        choose_steps: int = 60,
        seed: int = 0,
    ) -> None:
        """Prepare what all rows have in common.

        Args:
            generator: the frozen generator.
            results: where rows go, and which rows are done.
            recipe: how to fit training images; a contender's rates replace its own.
            held_out: how to fit held-out images' latents.
            start: where latents start.
            choose_steps: steps of the short runs that choose rates.
            seed: of deltas, latents and the order of images.

        Raises:
            ValueError: if the label is no class of the generator.
        """
        if not 0 <= start.label < generator.model.num_classes:
            raise ValueError(
                f"label {start.label}: the generator has {generator.model.num_classes} "
                "classes"
            )
        self.generator, self.results, self.recipe = generator, results, recipe
        self.start, self.choose_steps, self.seed = start, choose_steps, seed
        self.workdir = results.path.parent
        apply = from_linen(generator.model, inputs=("z", "y"))
        self._apply = of_label(apply, start.label)
        self._outside = Inverter(self._apply, {}, held_out)
        self.drawer = Drawer(self._apply)
        self._network = "".join(fingerprint(generator.params).values())

    def fill(
        self, domains: Sequence[Images], contenders: Mapping[str, Contender]
    ) -> None:
        """Fit what the results do not hold yet.

        Raises:
            ValueError: if they hold a row of another generator or of other images, or
                if a contender has no rates.
            NonFiniteLoss: if a loss is not finite.
        """
        if idle := [name for name, x in contenders.items() if not x.rates]:
            raise ValueError(f"no rates for {idle}; give each at least one candidate")
        for name, contender in contenders.items():
            groups = [domains] if contender.together else [[d] for d in domains]
            recipe = replace(
                self.recipe,
                rates=contender.rates[0],
                # One step of each domain's own for every step they take together.
                steps=self.recipe.steps * len(groups[0]),
            )
            inverter = Inverter(self._apply, contender.rules, recipe)
            for group in groups:
                inputs = self._inputs(group)
                if not all(self._find(name, d.name, inputs) for d in group):
                    self._fit(name, inverter, contender.rates, group, inputs)

    def _inputs(self, group: Sequence[Images]) -> str:
        return short_hash(self._network, *(x.tobytes() for d in group for x in d[1:]))

    def _find(self, name: str, domain: str, inputs: str) -> bool:
        labels = domain, domain + HELD_OUT
        found = [self.results.find(name, x, self.seed, inputs=inputs) for x in labels]
        return None not in found

    def _fit(
        self,
        name: str,
        inverter: Inverter,
        rates: Sequence[Mapping[str, float]],
        group: Sequence[Images],
        inputs: str,
    ) -> None:
        """Fit one delta and the latents of the domains that share it."""
        found, details = self._best(name, inverter, rates, group, inputs)
        delta, state = found.task.delta["generator"], found.task.model_state
        adapted = self.generator._replace(
            params=materialize(self.generator.params, delta), model_state=state
        )
        first = 0
        for domain in group:
            rows = slice(first, first := first + len(domain.train))
            own = {k: table[rows] for k, table in tables(found.task.delta).items()}
            task = Task(beside(delta, make_latents(**own)), state)
            self._finish(name, domain.name, domain.train, task, found, inputs, details)
            label = domain.name + HELD_OUT
            outside = self._invert(
                self._outside, adapted, domain.held_out, f"{label} / {name}", inputs
            )
            # Saved with the delta, so that it too opens on the frozen generator.
            task = Task(
                beside(delta, make_latents(**tables(outside.task.delta))), state
            )
            self._finish(name, label, domain.held_out, task, outside, inputs, {})
        shutil.rmtree(self.workdir / "state", ignore_errors=True)

    def _best(
        self,
        name: str,
        inverter: Inverter,
        rates: Sequence[Mapping[str, float]],
        group: Sequence[Images],
        inputs: str,
    ) -> tuple[Inverted, dict[str, Any]]:
        """Fit with the candidate whose short run comes nearest to the images."""
        images = np.concatenate([d.train for d in group])
        names = [d.name for d in group]
        title = f"{' + '.join(names)} / {name}"
        tried = []
        for each in rates if len(rates) > 1 else []:
            short = inverter.at(each, steps=self.choose_steps * len(group))
            found = self._invert(short, self.generator, images, title, inputs)
            tried.append({"rates": dict(each), "psnr": found.reached[1]})
        if tried:
            inverter = inverter.at(max(tried, key=lambda x: x["psnr"])["rates"])
        found = self._invert(inverter, self.generator, images, title, inputs)
        return found, {
            "fitted": names,
            "rates": dict(inverter.recipe.rates),
            "candidates": tried,
            "kept_step": found.reached[0],
        }

    def _invert(
        self,
        inverter: Inverter,
        generator: Generator,
        images: UInt8[np.ndarray, "n h w 3"],
        title: str,
        inputs: str,
    ) -> Inverted:
        recipe = inverter.recipe
        key = short_hash(title, inputs, recipe, self.start, self.seed)
        with progress_bar(
            title, steps=recipe.steps, batch_size=recipe.batch_size
        ) as on_log:
            return inverter.run(
                generator.params,
                generator.model_state,
                images,
                self.start.tables(generator, len(images), seed=self.seed),
                seed=self.seed,
                folder=StateFolder(self.workdir / "state" / key),
                on_log=on_log,
            )

    def _finish(
        self,
        name: str,
        label: str,
        images: UInt8[np.ndarray, "n h w 3"],
        task: Task,
        found: Inverted,
        inputs: str,
        details: Mapping[str, Any],
    ) -> None:
        """Measure, save and note one set of images."""
        drawn = self.drawer(self.generator.params, task)
        values = np.asarray(psnr(jnp.asarray(drawn), jnp.asarray(in_range(images))))
        parts = count(task.delta["generator"])
        details = {"images": len(images), "std": float(values.std()), **details}
        save_task(
            self.place(name, label),
            for_file(task),
            shared=self.generator.params,
            name=label,
            metadata={"method": name, "curve": found.curve, **details},
        )
        if self.results.find(name, label, self.seed, inputs=inputs):
            return  # the run was stopped after this row of several
        self.results.add(
            Row(
                method=name,
                task=label,
                seed=self.seed,
                metric="psnr",
                value=float(values.mean()),
                task_params=parts.total,
                shared_params=_size(self.generator.params),
                steps=found.steps,
                seconds=round(found.seconds, 2),
                by_group=count(task.delta).by_group,
                details=details,
                inputs=inputs,
            )
        )
        print(
            f"{label:>30}  {name:<22} {values.mean():6.2f} dB {found.seconds:7.1f} s",
            flush=True,
        )

    def place(self, name: str, label: str) -> Path:
        """Name the folder of a fitted set of images."""
        seed = f"seed{self.seed}"
        return self.workdir / "tasks" / slug(label) / slug(name) / seed


def _size(params: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(params))
