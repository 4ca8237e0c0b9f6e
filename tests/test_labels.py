"""Labels in pictures can be read."""

from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from ftn_jax.labels import place_labels

# Twelve methods of nearly one size and accuracy, and one at each end.
CROWD = {f"method {n}": (1 + 0.05 * n, 40 + n % 3) for n in range(12)}
POINTS = CROWD | {"the smallest": (0.1, 40.0), "the largest of them": (100.0, 42.0)}


@pytest.fixture
def axes():
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for point in POINTS.values():
        axes.plot(*point, "k*", markersize=13)
    axes.set(xscale="log", ylim=(0, 80))
    yield axes
    plt.close(figure)


def boxes(labels):
    return [Text.get_window_extent(label) for label in labels]


def overlaps(boxes):
    pairs = combinations(boxes, 2)
    return [True for a, b in pairs if Bbox.intersection(a, b) is not None]


def test_no_label_covers_another_or_a_point(axes):
    labels = place_labels(axes, POINTS)
    assert [label.get_text() for label in labels] == [*POINTS]
    axes.figure.canvas.draw()  # as in the file
    found = boxes(labels)
    assert not overlaps(found)
    points = axes.transData.transform([*POINTS.values()])
    assert not any(box.contains(*point) for box in found for point in points)
    frame = axes.get_window_extent()
    for box in found:
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1
    # The crowd's labels moved; who stands alone has its own beside it.
    near = np.hypot(*labels[-2].get_position()) * axes.figure.dpi / 72
    assert near < found[-2].width


def test_labels_all_at_the_same_offset_would_cover_each_other(axes):
    plain = [
        axes.annotate(name, point, (8, -14), textcoords="offset points")
        for name, point in POINTS.items()
    ]
    axes.figure.canvas.draw()
    assert overlaps(boxes(plain))
