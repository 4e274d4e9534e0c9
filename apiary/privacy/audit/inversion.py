"""Token presence from the gradient of a LoRA factor, as in DAGER (Petrov et al. 2024).

The gradient of A is s B^T (dL/dY)^T X: its rows lie in the span of the layer's inputs x_t, and the inputs of a model's
first layers follow from their tokens alone. So a token that was in the batch has an input inside the span of the rows,
and with fewer distinct tokens than rows hardly any other token has.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_LEAST = 1e-3  # of the largest singular value; below it is rounding


def span(gradients: Tensor) -> Tensor:
    """An orthonormal basis of the row space, (rank, d); directions below a thousandth of the largest are rounding.

    Args:
        gradients: (rows, d), of all factors A whose layers have the same input, one upon the other.
    """
    _, values, directions = torch.linalg.svd(gradients.double(), full_matrices=False)
    kept: Tensor = directions[values > _LEAST * values[:1]]
    return kept


def presence(inputs: Tensor, gradients: Tensor) -> np.ndarray:
    """How much of each token's input lies in the span of the gradients' rows, (V,) in 0..1; 1 says that it was there.

    Args:
        inputs: (V, d), the layers' input for each token of the vocabulary.
        gradients: (rows, d).
    """
    basis = span(gradients)
    whole = inputs.double()
    share = (whole @ basis.T).square().sum(1) / whole.square().sum(1).clamp_min(1e-30)
    return np.asarray(share)


def recovery(scores: np.ndarray, present: np.ndarray, ignored: np.ndarray) -> float:
    """The share of the batch's distinct tokens among as many guesses; NaN where no token counts.

    Args:
        scores: (V,) from `presence`.
        present: ids of the distinct tokens of the batch.
        ignored: ids that count on neither side, such as those that the template puts into every row.
    """
    candidates = np.setdiff1d(np.arange(len(scores)), ignored)
    wanted = np.setdiff1d(present, ignored)
    if not len(wanted):
        return float("nan")
    guessed = candidates[np.argsort(-scores[candidates], kind="stable")[: len(wanted)]]
    return len(np.intersect1d(guessed, wanted)) / len(wanted)
