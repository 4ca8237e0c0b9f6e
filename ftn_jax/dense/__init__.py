"""Losses, metrics and measures of dense prediction: a value for every pixel."""

from ftn_jax.dense.boundary import BoundaryScores, benchmark, count_matches
from ftn_jax.dense.joint_tasks import JointTasks
from ftn_jax.dense.losses import (
    cross_entropy,
    depth_l1,
    edge_cross_entropy,
    normals_l1,
)
from ftn_jax.dense.measures import depth, edges, normals, semseg
from ftn_jax.dense.metrics import delta_m

__all__ = [
    "BoundaryScores",
    "JointTasks",
    "benchmark",
    "count_matches",
    "cross_entropy",
    "delta_m",
    "depth",
    "depth_l1",
    "edge_cross_entropy",
    "edges",
    "normals",
    "normals_l1",
    "semseg",
]
