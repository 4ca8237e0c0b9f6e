"""A network that is not ours: Tiny Darknet, adapted through the public API alone.

`TinyDarknet` below is a plain Flax Linen module as anyone would write it; nothing in
it knows of tasks. Three patterns name its leaves (`LAYERS`), one function reads its
weights, and every method of the library applies.

    python -m experiments.tiny_darknet --data DIR --weights tiny_darknet_hwio.npz

The weights are the authors' (public domain, ImageNet-1k), as `.npz` with the names
`conv2d_1.kernel` (HWIO) ... `conv2d_16.bias` and `batch_normalization_1.gamma` ...
Images are RGB in [0, 1]. Without --data the domain is scikit-learn's handwritten
digits; without --weights the network is random.

Source of the architecture: tiny.cfg of Darknet (Redmon); 1,046,488 values.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from ftn_jax.adapt import Recipe
from ftn_jax.apply import from_linen
from ftn_jax.command import launch
from ftn_jax.data import (
    Compose,
    Domain,
    Normalize,
    RandomCrop,
    Resize,
    ToRGB,
    find_domains,
    load_digits,
    load_domain,
)
from ftn_jax.method import Backbone
from ftn_jax.presets import Layers, bn_head, ftn
from ftn_jax.pretrained import read_weights
from ftn_jax.results import Results
from ftn_jax.sweep import Contender, sweep
from ftn_jax.tables import report

WIDTHS = (16, 32, 16, 128, 16, 128, 32, 256, 32, 256, 64, 512, 64, 512, 128)
WIDE = {1, 2, 4, 6, 8, 10, 12, 14}  # 3x3 convolutions; the others are 1x1
POOLED = {1, 2, 6, 10}

# Every convolution but the first carries factors; conv_16 is the head.
LAYERS = Layers(
    kernels=r"conv_([2-9]|1[0-5])/kernel",
    norms=r"bn_\d+/(scale|bias)",
    head=r"conv_16/(kernel|bias)",
)


class TinyDarknet(nn.Module):
    """Tiny Darknet; fully convolutional, any image size from 16 px on.

    Attributes:
        num_classes: size of the head.
        depth: convolutions that features are taken of; logits take all.
    """

    num_classes: int = 1000
    depth: int = len(WIDTHS)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w 3"], train: bool = False, features: bool = False
    ) -> Any:
        """Return the logits (b, classes), or each convolution's features by its name.

        Features are those before the pooling.
        """
        found = {}
        for i, width in enumerate(WIDTHS[: self.depth], start=1):
            size = (3, 3) if i in WIDE else (1, 1)
            x = nn.Conv(width, size, use_bias=False, name=f"conv_{i}")(x)
            x = nn.BatchNorm(
                use_running_average=not train,
                momentum=0.9,
                epsilon=1e-3,
                use_fast_variance=False,
                name=f"bn_{i}",
            )(x)
            x = found[f"conv_{i}"] = nn.leaky_relu(x, 0.1)
            if i in POOLED:
                x = nn.max_pool(x, (2, 2), (2, 2))
        if features:
            return found
        return nn.Conv(self.num_classes, (1, 1), name="conv_16")(x).mean(axis=(1, 2))


def load_weights(path: str | Path) -> dict[str, Any]:
    """Read the published weights into `{"params": ..., "batch_stats": ...}`.

    Raises:
        ValueError: if names or shapes are not those of the network (lists them).
    """
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(TinyDarknet().init, jax.random.key(0), image)
    names = {
        "kernel": ("conv2d", "kernel"),
        "scale": ("batch_normalization", "gamma"),
        "mean": ("batch_normalization", "moving_mean"),
        "var": ("batch_normalization", "moving_variance"),
    }

    def name(path: Any) -> str:
        module, leaf = path[-2].key, path[-1].key
        kind, number = module.split("_")
        layer, field = names.get(
            leaf,
            ("conv2d", "bias") if kind == "conv" else ("batch_normalization", "beta"),
        )
        return f"{layer}_{number}.{field}"

    weights: Mapping[str, np.ndarray] = read_weights(path)
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    expected = {name(path): leaf.shape for path, leaf in leaves}
    wrong = [
        f"{key}: found {weights[key].shape if key in weights else 'nothing'}, "
        f"expected {expected.get(key, 'nothing')}"
        for key in sorted({*weights, *expected})
        if key not in weights or weights[key].shape != expected.get(key)
    ]
    if wrong:
        raise ValueError(f"{path} is not Tiny Darknet: {'; '.join(wrong)}")
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.asarray(weights[name(path)]), shapes
    )


@dataclass(frozen=True)
class Config:
    """Settings of the Tiny Darknet experiment."""

    data: Path | None = None
    """Folder of the domains; without it, scikit-learn's handwritten digits."""
    weights: Path | None = None
    """The `.npz` of the published weights; without it the network is random."""
    workdir: Path = Path("runs/tiny_darknet")
    """Folder for the table and the saved tasks."""
    domains: tuple[str, ...] = ()
    """Names of the domains in the data folder; all if empty."""
    rank: int = 10
    """Rank of the FTN row."""
    image_px: int = 64
    """Images are resized to this height and width."""
    max_train: int = 3000
    """Use at most so many training images of each domain."""
    max_test: int = 2000
    """Use at most so many test images of each domain."""
    epochs: int = 8
    """Passes over the training images."""
    batch_size: int = 32
    """Images per step."""
    factor_rate: float = 5e-3
    """Adam's peak rate for FTN's factors."""
    rate: float = 8e-3
    """SGD's peak rate for norms and head."""
    seed: int = 0
    """Seed of init, data order and augmentation."""

    @classmethod
    def tiny(cls) -> "Config":
        """Return settings for a trial of under a minute."""
        return cls(
            workdir=Path("runs/tiny_darknet_tiny"),
            rank=2,
            image_px=16,
            max_train=128,
            max_test=64,
            epochs=1,
        )


def main(cfg: Config) -> Results:
    """Adapt Tiny Darknet to each domain with and without factors."""
    if cfg.weights:
        variables = load_weights(cfg.weights)
    else:
        print("warning: no --weights: the network is random, the numbers mean little")
        image = jnp.zeros((1, cfg.image_px, cfg.image_px, 3))
        variables = TinyDarknet().init(jax.random.key(0), image)
    backbone = Backbone(
        network=lambda classes: from_linen(TinyDarknet(num_classes=classes)),
        shared=variables["params"],
        model_state={"batch_stats": variables["batch_stats"]},
        layers=LAYERS,
    )
    rates = {"norm": cfg.rate, "head": cfg.rate}
    results = Results(
        cfg.workdir,
        experiment="tiny_darknet",
        config=asdict(cfg),
        free=("data", "domains", "rank", "seed", "workdir"),
    )
    resize = Resize(cfg.image_px, cfg.image_px)
    crop = RandomCrop(cfg.image_px, padding=cfg.image_px // 16)
    sweep(
        backbone,
        _domains(cfg),
        {
            "BN + head": Contender(
                lambda classes: bn_head(LAYERS, classes=classes), [rates]
            ),
            f"FTN R={cfg.rank}": Contender(
                lambda classes: ftn(LAYERS, classes=classes, rank=cfg.rank),
                [rates | {"factors": cfg.factor_rate}],
            ),
        },
        results=results,
        recipe=Recipe(epochs=cfg.epochs, batch_size=cfg.batch_size, rates={}),
        train_transform=Compose((resize, crop, ToRGB(), Normalize())),
        eval_transform=Compose((resize, ToRGB(), Normalize())),
        seeds=(cfg.seed,),
        validation=0.0,
        workdir=cfg.workdir,
    )
    report(results)
    return results


def _domains(cfg: Config) -> list[Domain]:
    if cfg.data is None:
        domains = [load_digits()]
    else:
        paths = find_domains(cfg.data, cfg.domains or None).values()
        domains = [load_domain(path) for path in paths]
    return [d.limited(train=cfg.max_train, test=cfg.max_test) for d in domains]


if __name__ == "__main__":
    launch(Config, main)
