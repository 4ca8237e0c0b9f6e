"""Labels of points in a picture, placed so that none covers another."""

from collections.abc import Mapping
from typing import Any

import numpy as np

# From a point to its label, in points of type, and to which side: where several
# places are free, the first of the list is taken.
_DISTANCES = (9, 20, 32, 45, 60, 80)
_ANGLES = (0, 90, -90, 180, 30, -30, 150, -150, 60, -60, 120, -120)
_MARKER = 12


def place_labels(axes: Any, points: Mapping[str, tuple[float, float]]) -> list[Any]:
    """Write a label beside each point, joined to it by a line.

    One after another, each goes where it covers least of the points and of the labels
    before it and lies within the frame; near its point if it can. Limits, scale and
    legend have to be there already: the layout stays as it is then.

    Args:
        axes: of matplotlib.
        points: the place of each label's point, in the units of the axes.

    Returns:
        matplotlib's annotations, in the order of `points`.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure = axes.figure
    figure.draw_without_rendering()  # only now do points have a place
    figure.set_layout_engine("none")
    frame, scale = axes.get_window_extent(), figure.dpi / 72

    def box(center: Any, size: Any) -> Any:
        return Bbox.from_bounds(*(center - size / 2), *size)

    def common(one: Any, other: Any) -> float:
        part = Bbox.intersection(one, other)
        return part.width * part.height if part else 0.0

    def cost(place: Any) -> float:
        outside = place.width * place.height - common(place, frame)
        return 10 * outside + sum(common(place, other) for other in taken)

    centers = [axes.transData.transform(point) for point in points.values()]
    taken = [box(center, np.full(2, _MARKER * scale)) for center in centers]
    labels = []
    for (name, point), center in zip(points.items(), centers, strict=True):
        label = axes.annotate(
            name,
            point,
            (0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            arrowprops={"arrowstyle": "-", "lw": 0.6, "color": "0.4", "shrinkB": 5},
            path_effects=[withStroke(linewidth=3, foreground="white")],
            zorder=5,
        )
        size = np.array(Text.get_window_extent(label).size)  # without the line
        # The label's near edge, not its middle, is at the distance.
        best = min(
            (
                box(center + distance * scale * way + np.sign(way) * size / 2, size)
                for distance in _DISTANCES
                for way in _ways()
            ),
            key=cost,
        )
        middle = (best.p0 + best.p1) / 2
        label.set_position(tuple((middle - center) / scale))
        taken.append(best)
        labels.append(label)
    return labels


def _ways() -> Any:
    angles = np.radians(_ANGLES)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).round(9)
