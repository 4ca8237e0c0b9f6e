"""Define the Vision Transformer module; `vit_family` names its published shapes."""

from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from ftn_jax.models.vit_block import ACTIVATIONS, Activation, TransformerBlock

_TOKEN_INIT = nn.initializers.normal(0.02)


class ViT(nn.Module):
    """Classify images, or give their features, with a Vision Transformer (NHWC).

    Parameter paths, the same with and without `remat`: `patch_embedding/{kernel,bias}`,
    `class_token`, `distillation_token`, `position_embedding`,
    `norm_pre/{scale,bias}` (if `stem_norm`), `blocks_{i}/norm{1,2}/{scale,bias}`,
    `blocks_{i}/attention/{query,key,value,out}/{kernel,bias}`,
    `blocks_{i}/mlp/fc{1,2}/{kernel,bias}`, `norm/{scale,bias}`, `projection/kernel`,
    `head/{kernel,bias}` and `head_distilled/{kernel,bias}`, with blocks i from 0. With
    `scan_layers` one subtree `blocks` has the leaves of all blocks, stacked on a first
    axis. `batch_stats` holds `feature_bn/{mean,var}` if `feature_norm`.

    Kernels of the blocks start Xavier-uniform, as in the original code; tokens,
    positions and heads normal with standard deviation 0.02.

    Attributes:
        num_classes: Size of the head; None or 0 for no head (the call gives the
            features).
        image_px: Height and width of the images, one number if they are equal.
        patch_px: Side of a patch, a divisor of `image_px`.
        width: Channels of a token.
        depth: Number of blocks.
        heads: Attention heads of a block, a divisor of `width`.
        mlp_width: Channels inside an MLP; None for four times `width`.
        activation: Of the MLPs: "gelu" (exact), "gelu_tanh" (its approximation, which
            the original JAX code used in training) or "quick_gelu" (CLIP).
        patch_bias: Whether the patch embedding has a bias.
        stem_norm: Whether a LayerNorm comes before the blocks.
        pool: "class" takes the class token for the features, "mean" has no class token
            and averages the patches, both after the last LayerNorm.
        distilled: A second token and head, learned from a teacher; the logits (without
            a head, the features) of the two are averaged, in training too.
        projection_width: Channels of the features after a projection without bias; None
            for none.
        feature_norm: Whether a BatchNorm without scale and bias precedes the head.
        norm_epsilon: Added to the variance in LayerNorm.
        dropout: Rate, in training, after the position embedding and after every dense
            layer of the blocks but query, key and value.
        scan_layers: Compile one block and scan over the depth; `stack_layers` turns
            parameters into those of this form.
        remat: Recompute each block in the backward pass instead of storing it.
        dtype: Type of the arithmetic and of the output; parameters stay float32.
        norm_axis_name: Name of the mapped axis over which `feature_norm` takes its
            statistics; None for each device its own.
        bn_momentum: Share of `feature_norm`'s old running statistics kept at an update.
        bn_epsilon: Added to the variance by `feature_norm`.

    Source: Dosovitskiy et al., "An image is worth 16x16 words" (2021), eq. 1 to 4;
    Radford et al., "Learning transferable visual models from natural language
    supervision" (2021), section 2.4, for `stem_norm` and the projection; Touvron et
    al., "Training data-efficient image transformers" (2021), section 4, for
    `distilled`.
    """

    num_classes: int | None = 1000
    image_px: int | tuple[int, int] = 224
    patch_px: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int | None = None
    activation: Activation = "gelu"
    patch_bias: bool = True
    stem_norm: bool = False
    pool: Literal["class", "mean"] = "class"
    distilled: bool = False
    projection_width: int | None = None
    feature_norm: bool = False
    norm_epsilon: float = 1e-6
    dropout: float = 0.0
    scan_layers: bool = False
    remat: bool = False
    dtype: Any = None
    norm_axis_name: str | None = None
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        px = self.image_px
        return (*((px, px) if isinstance(px, int) else px), 3)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        height, width, _ = self.image_shape
        return height // self.patch_px, width // self.patch_px

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches': class and distillation token."""
        return (self.pool == "class") + self.distilled

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w 3"],
        train: bool = False,
        features: bool = False,
    ) -> Float[Array, "b n"] | dict[str, Float[Array, "..."]]:
        """Return the logits (b, num_classes), or the features without a head.

        Args:
            x: Normalized images.
            train: Apply dropout (its random stream is "dropout"), and normalize by the
                batch's statistics and update `batch_stats` if `feature_norm`.
            features: Return {"tokens", "pooled"} and leave the head out: all tokens
                (b, n, width) after the last LayerNorm, and what a head receives.

        Raises:
            ValueError: If `x` is not of shape (b, *image_shape), or the attributes do
                not belong together.
        """
        _check(self, x.shape)
        norm = partial(
            nn.LayerNorm,
            epsilon=self.norm_epsilon,
            dtype=self.dtype,
            use_fast_variance=False,
        )
        dropout = partial(nn.Dropout, self.dropout, deterministic=not train)

        x = self._embed(x)
        x = dropout()(x)
        if self.stem_norm:
            x = norm(name="norm_pre")(x)
        x = self._run_blocks(x, norm=norm, dropout=dropout)
        tokens = norm(name="norm")(x)

        if self.distilled:
            pooled = tokens[:, :2]
        else:
            pooled = tokens.mean(1) if self.pool == "mean" else tokens[:, 0]
        if self.projection_width is not None:
            pooled = nn.Dense(
                self.projection_width,
                use_bias=False,
                kernel_init=nn.initializers.normal(self.width**-0.5),
                dtype=self.dtype,
                name="projection",
            )(pooled)
        if self.feature_norm:
            pooled = nn.BatchNorm(
                use_running_average=not train,
                use_scale=False,
                use_bias=False,
                momentum=self.bn_momentum,
                epsilon=self.bn_epsilon,
                dtype=self.dtype,
                axis_name=self.norm_axis_name,
                use_fast_variance=False,
                name="feature_bn",
            )(pooled)
        if features or not self.num_classes:
            pooled = pooled.mean(1) if self.distilled else pooled
            return {"tokens": tokens, "pooled": pooled} if features else pooled
        head = partial(
            nn.Dense, self.num_classes, kernel_init=_TOKEN_INIT, dtype=self.dtype
        )
        if self.distilled:
            student = head(name="head")(pooled[:, 0])
            return (student + head(name="head_distilled")(pooled[:, 1])) / 2
        return head(name="head")(pooled)

    def _embed(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b n width"]:
        """Turn patches into tokens, put the prefix tokens first and add positions."""
        patch = (self.patch_px, self.patch_px)
        x = nn.Conv(
            self.width,
            patch,
            strides=patch,
            padding="VALID",
            use_bias=self.patch_bias,
            dtype=self.dtype,
            name="patch_embedding",
        )(x)
        x = x.reshape(len(x), -1, self.width)
        names = ("class_token", "distillation_token")[: self.prefix_tokens]
        prefix = [
            jnp.broadcast_to(
                self.param(name, _TOKEN_INIT, (self.width,)).astype(x.dtype),
                (len(x), 1, self.width),
            )
            for name in names
        ]
        x = jnp.concatenate([*prefix, x], axis=1)
        positions = self.param("position_embedding", _TOKEN_INIT, x.shape[1:])
        return x + positions.astype(x.dtype)[None]

    def _run_blocks(
        self, x: Float[Array, "b n width"], *, norm: Any, dropout: Any
    ) -> Float[Array, "b n width"]:
        """Apply every block, in a Python loop or in a scan over their parameters."""
        block: Any = TransformerBlock
        if self.remat:
            # Inside a scan XLA cannot undo the recomputation; elsewhere it could.
            block = nn.remat(TransformerBlock, prevent_cse=not self.scan_layers)
        make = partial(
            block,
            heads=self.heads,
            hidden=4 * self.width if self.mlp_width is None else self.mlp_width,
            activation=self.activation,
            norm=norm,
            dropout=dropout,
            dtype=self.dtype,
        )
        if not self.scan_layers:
            for i in range(self.depth):
                x = make(name=f"blocks_{i}")(x)
            return x
        scan = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.depth,
        )
        return scan(make(name="blocks"), x, None)[0]


def _check(model: ViT, shape: tuple[int, ...]) -> None:
    height, width, channels = model.image_shape
    if height % model.patch_px or width % model.patch_px:
        raise ValueError(
            f"images of {height} x {width} px are not whole patches of "
            f"{model.patch_px} px: choose image_px as a multiple of patch_px"
        )
    if model.width % model.heads:
        raise ValueError(
            f"{model.heads} heads do not share a width of {model.width} equally: "
            "choose width as a multiple of heads"
        )
    if model.pool not in ("class", "mean"):
        raise ValueError(f'pool is "class" or "mean", found {model.pool!r}')
    if model.activation not in ACTIVATIONS:
        raise ValueError(
            f"activation is one of {[*ACTIVATIONS]}, found {model.activation!r}"
        )
    plain = model.pool == "class" and not model.feature_norm
    if model.distilled and not (plain and model.projection_width is None):
        raise ValueError(
            'a distilled ViT has pool="class", no projection and no feature_norm, '
            f"found pool={model.pool!r}, projection_width={model.projection_width}, "
            f"feature_norm={model.feature_norm}"
        )
    if len(shape) != 4 or shape[1:] != model.image_shape:
        raise ValueError(
            f"this ViT takes images of shape (b, {height}, {width}, {channels}), found "
            f"{shape}: resize them (channels last, grey repeated three times), or "
            "build the model with their image_px and load its weights for it"
        )
