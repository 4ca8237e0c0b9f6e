"""CP and Replace, written out."""

import numpy as np


def cp(w, node):
    """w[i, j, ..] + scale * sum_r f1[row1, r] f2[row2, r] .., entry by entry."""
    merged = np.array(w, np.float64)
    factors = [np.asarray(f, np.float64) for f in node.factors]
    for index in np.ndindex(*w.shape):
        product = np.ones(node.rank)
        for factor, span in zip(factors, node.axes, strict=True):
            row = 0
            for axis in span:
                row = row * w.shape[axis] + index[axis]
            product = product * factor[row]
        merged[index] += node.scale * product.sum()
    return merged


FORMULAS = {"CP": cp, "Replace": lambda w, node: np.array(node.value, float)}
