"""Clustered federation on dense weights, in plain numpy: angles, average linkage, silhouettes and rounds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def apart(changes: Sequence[Floats]) -> Floats:
    """1 - cosine of every two changes, each flattened."""
    flat = [change.ravel() for change in changes]
    return np.array([[1 - x @ y / np.sqrt((x @ x) * (y @ y)) for y in flat] for x in flat])


def linked(distances: Floats, count: int) -> set[frozenset[int]]:
    """Average linkage: the two groups of the least mean distance become one, until so many are left."""
    groups = [frozenset([k]) for k in range(len(distances))]
    while len(groups) > count:
        pairs = list(itertools.combinations(groups, 2))
        means = [np.mean([distances[i, j] for i in x for j in y]) for x, y in pairs]
        x, y = pairs[int(np.argmin(means))]
        groups = [group for group in groups if group not in (x, y)] + [x | y]
    return set(groups)


def silhouette(distances: Floats, groups: set[frozenset[int]]) -> float:
    """Rousseeuw 1987: the mean of (b - a) / max(a, b) over all points; 0 for one that is alone."""
    scores = []
    for group in groups:
        for k in group:
            if len(group) == 1:
                scores.append(0.0)
                continue
            a = np.mean([distances[k, j] for j in group - {k}])
            b = min(np.mean([distances[k, j] for j in other]) for other in groups - {group})
            scores.append((b - a) / max(a, b))
    return float(np.mean(scores))


def best_split(distances: Floats, most: int) -> tuple[set[frozenset[int]], float]:
    """The split into 2 to `most` groups of the best silhouette, and that."""
    found = [linked(distances, count) for count in range(2, min(most, len(distances) - 1) + 1)]
    scores = [silhouette(distances, groups) for groups in found]
    return found[int(np.argmax(scores))], max(scores)


def best_of_rank(matrix: Floats, rank: int) -> Floats:
    """The nearest matrix of a rank (Eckart and Young 1936)."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    kept: Floats = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return kept


def mean_of_groups(products: Mapping[int, Floats], members: Mapping[str, int], rank: int) -> Floats:
    """The mean of the groups' products, each counted by its clients, cut to a rank."""
    counts = [list(members.values()).count(g) for g in products]
    total: Floats = sum(n * product for n, product in zip(counts, products.values(), strict=True)) / sum(counts)
    return best_of_rank(total, rank)
