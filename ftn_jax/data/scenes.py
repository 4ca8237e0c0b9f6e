"""Synthetic rooms with consistent semantics, depth, normals and edges.

A camera stands in a box-shaped room with boxes and balls in it; every pixel's ray is
followed to the first surface. Depth, normals and classes come from the same hit, and
edges are where class or object changes or depth jumps.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from ftn_jax.data.dense import DenseArrays

KINDS = ("background", "floor", "ceiling", "wall", "box", "ball")
TARGETS = ("semseg", "depth", "normals", "edge")
# Classes as NYUD's files number them (0 is the background): floor, ceiling, wall, and
# two that stand for box and ball.
_TINTS = np.asarray(
    [
        (0, 0, 0),
        (150, 110, 70),
        (225, 225, 235),
        (150, 170, 190),
        (190, 70, 60),
        (70, 150, 80),
    ],
    np.float32,
)


class Scene(NamedTuple):
    """One picture and its truths, as `DenseExample.targets` names them."""

    image: np.ndarray
    semseg: Int[np.ndarray, "h w"]
    depth: Float[np.ndarray, "h w"]
    normals: Float[np.ndarray, "h w 3"]
    edge: Float[np.ndarray, "h w"]


class _Hits(NamedTuple):
    """What the rays have met so far."""

    distance: Float[np.ndarray, " n"]
    normal: Float[np.ndarray, "n 3"]
    kind: Int[np.ndarray, " n"]
    surface: Int[np.ndarray, " n"]

    def nearer(self, distance: Any, normal: Any, kind: Any, surface: Any) -> "_Hits":
        """Keep the nearer of the old and the new hits."""
        take = distance < self.distance
        return _Hits(
            np.where(take, distance, self.distance),
            np.where(take[:, None], normal, self.normal),
            np.where(take, kind, self.kind),
            np.where(take, surface, self.surface),
        )


def draw_scene(
    rng: np.random.Generator,
    *,
    size: tuple[int, int],
    things: int = 4,
    gaps: float = 0.03,
) -> Scene:
    """Draw one scene.

    x points right, y up, z into the picture; normals are those of the surface in that
    frame, facing the camera.

    Args:
        rng: source of everything random.
        size: (height, width) in pixels.
        things: number of boxes and balls.
        gaps: share of the pixels without depth and normals (0), as sensors have them.
    """
    height, width = size
    rows, columns = np.mgrid[0:height, 0:width] + 0.5
    rays = np.stack(
        [
            (columns - width / 2) / width,
            (height / 2 - rows) / width,
            np.full(size, 0.6),
        ],
        axis=-1,
    ).reshape(-1, 3)
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    turn = rng.uniform(-0.5, 0.5)
    rotation = np.asarray(
        [[np.cos(turn), 0, np.sin(turn)], [0, 1, 0], [-np.sin(turn), 0, np.cos(turn)]]
    )
    world = rays @ rotation.T
    room = np.asarray([rng.uniform(1.5, 3), 1.4, rng.uniform(3, 6)])  # half widths
    hits = _room(world, room)
    for n in range(things):
        make = _ball if rng.random() < 0.5 else _box
        hits = hits.nearer(*make(world, rng, room), 10 * (n + 1))
    normal = hits.normal @ rotation  # back to the camera's frame
    shade = 0.35 + 0.65 * np.abs(normal @ np.asarray([0.4, 0.75, -0.5]))
    tint = _TINTS[hits.kind] * rng.uniform(0.8, 1.2, (len(KINDS), 3))[hits.kind]
    grain = rng.normal(0, 6, tint.shape)
    light = shade[:, None] / (1 + 0.06 * hits.distance[:, None])
    image = np.clip(tint * light + grain, 0, 255)
    depth = (hits.distance * rays[:, 2]).reshape(size)
    surface = hits.surface.reshape(size)
    missing = (rng.random(size) < gaps).reshape(-1)
    return Scene(
        image=image.reshape(*size, 3).astype(np.uint8),
        semseg=hits.kind.reshape(size).astype(np.int32),
        depth=np.where(missing.reshape(size), 0, depth).astype(np.float32),
        normals=np.where(missing[:, None], 0, normal)
        .reshape(*size, 3)
        .astype(np.float32),
        edge=_changes(surface).astype(np.float32),
    )


def _room(rays: Float[np.ndarray, "n 3"], half: Float[np.ndarray, "3"]) -> _Hits:
    """Meet the walls from inside; the camera is in the middle."""
    with np.errstate(divide="ignore"):
        distances = np.where(rays > 0, half, -half) / rays
    axis = distances.argmin(axis=-1)
    along = np.arange(len(rays)), axis
    sign = np.sign(rays[along])
    normal = np.zeros_like(rays)
    normal[along] = -sign
    kind = np.where(axis == 1, np.where(sign < 0, 1, 2), 3)
    return _Hits(distances[along], normal, kind, 2 * axis + (sign > 0))


def _ball(rays: Any, rng: np.random.Generator, room: Any) -> tuple[Any, Any, int]:
    radius = rng.uniform(0.25, 0.6)
    centre = _place(rng, room, radius)
    middle = rays @ centre
    under = middle**2 - centre @ centre + radius**2
    distance = np.where(under > 0, middle - np.sqrt(np.maximum(under, 0)), np.inf)
    distance = np.where(distance > 0, distance, np.inf)
    near = np.where(np.isfinite(distance), distance, 0)
    return distance, (rays * near[:, None] - centre) / radius, 5


def _box(rays: Any, rng: np.random.Generator, room: Any) -> tuple[Any, Any, int]:
    half = rng.uniform(0.2, 0.6, 3)
    centre = _place(rng, room, half[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        first, second = (centre - half) / rays, (centre + half) / rays
    enter, leave = np.minimum(first, second), np.maximum(first, second)
    axis = enter.argmax(axis=-1)
    along = np.arange(len(rays)), axis
    hit = (enter[along] < leave.min(axis=-1)) & (enter[along] > 0)
    normal = np.zeros_like(rays)
    normal[along] = -np.sign(rays[along])
    return np.where(hit, enter[along], np.inf), normal, 4


def _place(rng: np.random.Generator, room: Any, half: float) -> Float[np.ndarray, "3"]:
    """Stand something on the floor, before the camera."""
    side, deep = 0.7 * room[0], rng.uniform(1.6, max(1.8, 0.8 * room[2]))
    return np.asarray([rng.uniform(-side, side), half - room[1], deep])


def _changes(surface: Int[np.ndarray, "h w"]) -> Any:
    edge = np.zeros(surface.shape, bool)
    edge[:, 1:] |= surface[:, 1:] != surface[:, :-1]
    edge[1:] |= surface[1:] != surface[:-1]
    return edge


def scenes(
    count: int,
    *,
    size: tuple[int, int] = (80, 120),
    seed: int = 0,
    targets: Sequence[str] = TARGETS,
) -> DenseArrays:
    """Draw scenes into memory; another seed draws others.

    Args:
        count: number of scenes.
        size: (height, width) in pixels.
        seed: of the scenes.
        targets: which of "semseg", "depth", "normals", "edge".
    """
    rng = np.random.default_rng((seed, 0x5CE))
    drawn = [draw_scene(rng, size=size) for _ in range(count)]
    return DenseArrays(
        np.stack([scene.image for scene in drawn]),
        {name: np.stack([getattr(s, name) for s in drawn]) for name in targets},
    )


def write_nyud(
    root: str | Path, *, train: int, val: int, size: tuple[int, int], seed: int = 0
) -> Path:
    """Write scenes as the published `NYUD_MT` folder has its files.

    Lossless but for the pictures and normals, which are JPEG there too.

    Args:
        root: where `NYUD_MT/` is made.
        train: number of training scenes.
        val: number of validation scenes.
        size: (height, width) in pixels.
        seed: of the scenes.

    Returns:
        The folder `root/NYUD_MT`.
    """
    from PIL import Image
    from scipy.io import savemat

    folder = Path(root) / "NYUD_MT"
    for name in ("gt_sets", "images", "edge", "segmentation", "normals", "depth"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng((seed, 0x5CE))
    number = 0
    for split, count in (("train", train), ("val", val)):
        ids = [f"{number + n + 1:04d}" for n in range(count)]
        number += count
        (folder / "gt_sets" / f"{split}.txt").write_text("\n".join(ids) + "\n")
        for name in ids:
            scene = draw_scene(rng, size=size)
            jpeg: dict[str, Any] = {"quality": 95, "subsampling": 0}
            Image.fromarray(scene.image).save(folder / f"images/{name}.jpg", **jpeg)
            stored = np.rint((scene.normals + 1) * 127.5).astype(np.uint8)
            Image.fromarray(stored).save(folder / f"normals/{name}.jpg", **jpeg)
            edge = (255 * scene.edge).astype(np.uint8)
            Image.fromarray(edge).save(folder / f"edge/{name}.png")
            savemat(folder / f"segmentation/{name}.mat", {"segmentation": scene.semseg})
            savemat(folder / f"depth/{name}.mat", {"depth": scene.depth})
    return folder
