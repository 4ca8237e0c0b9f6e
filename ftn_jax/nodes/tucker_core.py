"""The cores of latent Tucker: which kernels make one tensor, and what is kept of it.

Source: Bulat, Kossaifi, Tzimiropoulos, Pantic, "Incremental multi-domain learning with
network latent tensor factorization" (arXiv 1904.06345).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ftn_jax.nodes.adapter_svd import resolve_rank
from ftn_jax.nodes.tucker import Tucker, source_name
from ftn_jax.paths import at, path_name, some

Groups = Mapping[str, Sequence[Sequence[str]]]
"""The kernels' paths by label, block and place in the block: `{label: [[path]]}`."""


def tucker_groups(shared: Any, pattern: str) -> dict[str, list[list[str]]]:
    """Sort the kernels that a pattern matches by label, block and place in the block.

    Args:
        shared: the backbone's tree.
        pattern: regular expression of whole paths with groups named label, block and
            conv, for our ResNets
            `r"(?P<label>layer\\d+)_(?P<block>\\d+)/conv(?P<conv>\\d)/kernel"`.

    Returns:
        `{label: [[path of each conv] of each block]}`; numbers count as numbers.

    Raises:
        ValueError: if the pattern lacks a group, matches no path or gives two paths
            one place, or if the blocks of a label have different convs.
    """
    wanted = {"label", "block", "conv"}
    if missing := wanted - {*re.compile(pattern).groupindex}:
        raise ValueError(
            f"pattern {pattern!r} needs groups named label, block and conv, such as "
            f"(?P<block>...); found none named {sorted(missing)}"
        )
    leaves = jax.tree_util.tree_leaves_with_path(shared)
    paths = [path_name(path) for path, _ in leaves]
    found: dict[str, dict[str, dict[str, str]]] = {}
    for path in paths:
        if match := re.fullmatch(pattern, path):
            block = found.setdefault(match["label"], {}).setdefault(match["block"], {})
            if (other := block.setdefault(match["conv"], path)) != path:
                raise ValueError(
                    f"pattern {pattern!r} gives {other} and {path} one place in the "
                    "stack; let its groups tell them apart"
                )
    if not found:
        raise ValueError(
            f"pattern {pattern!r} matches no path (a pattern must match the whole "
            f"path); shared has the leaves {some(paths)}"
        )
    for label, blocks in found.items():
        names = {block: sorted(convs, key=_natural) for block, convs in blocks.items()}
        if len({*map(tuple, names.values())}) > 1:
            raise ValueError(
                f"{label}: every block needs the same convs, found {names}; leave a "
                "block out or give it another label"
            )
    return {
        label: [
            [blocks[block][conv] for conv in sorted(blocks[block], key=_natural)]
            for block in sorted(blocks, key=_natural)
        ]
        for label, blocks in found.items()
    }


def tucker_cores(
    shared: Any,
    groups: Groups,
    *,
    ranks: Sequence[int | float | None] | None = None,
    pad: bool = False,
) -> dict[str, dict[str, Array]]:
    """Stack each group's kernels to the core that lies beside the backbone.

    Args:
        shared: the backbone's tree.
        groups: the kernels' paths, from `tucker_groups` or written out.
        ranks: cut the core by a higher-order SVD to these sizes, for the axes
            (blocks, convs, *kernel): a number, a share of the size, or None to leave
            an axis whole. This changes the base: a task then starts at the cut
            kernels, not at the pretrained ones, and the source task itself needs its
            factors, which are kept with the core. The original found that it costs
            accuracy on the source.
        pad: let kernels with fewer channels in, filled up with zeros: the first
            convolution of a stage, which makes the paper's stack of all of a stage's
            convolutions out of a plain ResNet.

    Returns:
        `{label: {"core": (blocks, convs, *kernel)}}` for `extend(shared, tucker=...)`,
        and `"source_<axis>"` (size, rank) beside it for each axis that was cut.

    Raises:
        ValueError: if a path is not in shared, if the blocks of a label have different
            numbers of convs, if the kernels' shapes differ (without `pad`: at all,
            with it: but for the last two axes), or for bad ranks.
    """
    leaves = jax.tree_util.tree_leaves_with_path(shared)
    weights = {path_name(path): w for path, w in leaves}
    cores = {}
    for label, grid in groups.items():
        with at(label):
            cores[label] = _truncate(_stack(weights, grid, pad), ranks)
    return cores


def tucker_rules(
    groups: Groups, cores: Mapping[str, Mapping[str, Any]], *, group: str = "factors"
) -> dict[str, Callable[..., Tucker]]:
    """Write the rules that give every kernel of the groups its node.

    Args:
        groups: the kernels' paths, as given to `tucker_cores`.
        cores: what that returned.
        group: optimizer group.

    Returns:
        Rules for `make_delta`, one for each path; put them before other rules.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from ftn_jax import count, extend, make_delta
        >>> shared = {f"layer1_{b}": {"conv1": jnp.ones((3, 3, 8, 8))} for b in "01"}
        >>> pattern = r"(?P<label>layer1)_(?P<block>.)/(?P<conv>conv1)"
        >>> groups = tucker_groups(shared, pattern)
        >>> cores = tucker_cores(shared, groups)
        >>> cores["layer1"]["core"].shape
        (2, 1, 3, 3, 8, 8)
        >>> extended = extend(shared, tucker=cores)
        >>> delta = make_delta(jax.random.key(0), extended, tucker_rules(groups, cores))
        >>> count(delta).total  # 2*2 + 1*1 + 3*3 + 3*3 + 8*8 + 8*8
        151
    """
    return {
        re.escape(path): partial(
            Tucker.init, share=label, index=(b, c), stack=cores[label], group=group
        )
        for label, grid in groups.items()
        for b, block in enumerate(grid)
        for c, path in enumerate(block)
    }


def _stack(
    weights: Mapping[str, Any], grid: Sequence[Sequence[str]], pad: bool
) -> Float[Array, "blocks convs ..."]:
    if not grid or len({len(block) for block in grid}) > 1 or not grid[0]:
        raise ValueError(
            f"every block needs the same number of convs, found "
            f"{[len(block) for block in grid]}"
        )
    paths = [path for block in grid for path in block]
    if missing := [path for path in paths if path not in weights]:
        raise ValueError(
            f"found no {missing} in shared, which has the leaves {some([*weights])}"
        )
    shapes = {path: weights[path].shape for path in paths}
    ndim = max(map(len, shapes.values()))
    if any(len(s) != ndim for s in shapes.values()) or ndim < 2:
        raise ValueError(f"kernels of one number of axes >= 2 stack, found {shapes}")
    size = tuple(max(sizes) for sizes in zip(*shapes.values(), strict=True))
    odd = {
        p: s for p, s in shapes.items() if s[:-2] != size[:-2] or s != size and not pad
    }
    if odd:
        raise ValueError(
            f"kernels of one shape stack, found {odd} among {size}; leave their blocks "
            "out, give them a label of their own, or fill up channels with pad=True"
        )

    def filled(path: str) -> Array:
        more = [(0, m - n) for n, m in zip(shapes[path], size, strict=True)]
        return jnp.pad(weights[path], more)

    stack = jnp.stack([jnp.stack([filled(p) for p in block]) for block in grid])
    return stack.astype(jnp.promote_types(stack.dtype, jnp.float32))


def _truncate(
    stack: Float[Array, "blocks convs ..."],
    ranks: Sequence[int | float | None] | None,
) -> dict[str, Array]:
    """Cut a stack to its leading singular vectors, axis by axis."""
    if ranks is None:
        return {"core": stack}
    if len(ranks) != stack.ndim:
        raise ValueError(
            f"ranks need one entry for each of the axes (blocks, convs, *kernel) = "
            f"{stack.shape}, found {tuple(ranks)}"
        )
    whole = core = np.asarray(stack, np.float64)
    sources = {}
    for axis, rank in enumerate(ranks):
        if rank is None:
            continue
        unfolded = np.moveaxis(whole, axis, 0).reshape(whole.shape[axis], -1)
        directions = np.linalg.eigh(unfolded @ unfolded.T)[1][:, ::-1]
        u = directions[:, : resolve_rank(rank, len(directions))]
        core = np.moveaxis(np.tensordot(core, u, axes=(axis, 0)), -1, axis)
        sources[source_name(axis)] = jnp.asarray(u, stack.dtype)
    return {"core": jnp.asarray(core, stack.dtype)} | sources


def _natural(name: str) -> tuple[bool, int, str]:
    return (not name.isdigit(), int(name) if name.isdigit() else 0, name)
