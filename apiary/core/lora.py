"""Algebra on LoRA factors, one module at a time, without ever making a dense d_out x d_in matrix.

A module's matrix is B A with B of (d_out, r) and A of (r, d_in). Factors are not unique: (B G)(G^-1 A) is the same
matrix for every invertible G, its gauge. What this module computes of products (norms, inner products, spectra) does
not depend on the gauge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from apiary.core.tensors import StateDict

Scaling: TypeAlias = Callable[[int], float]  # by rank: the s in W + s B A
_A, _B, _GATE = ".lora_A.weight", ".lora_B.weight", ".lora_gate.weight"
_BASE = "base_delta."


class Factors(NamedTuple):
    """The matrix `b @ a`."""

    b: Tensor  # (d_out, r)
    a: Tensor  # (r, d_in)

    @property
    def rank(self) -> int:
        """How many columns `b` and rows `a` has; the matrix may have a lower rank."""
        return len(self.a)


class Svd(NamedTuple):
    """The matrix `u @ diag(s) @ vt`; `u` has orthonormal columns, `vt` orthonormal rows, `s` falls."""

    u: Tensor  # (d_out, k)
    s: Tensor  # (k,)
    vt: Tensor  # (k, d_in)


def scaling(alpha: float, kind: Literal["rslora", "lora"]) -> Scaling:
    """The scale of a product by its rank: alpha / sqrt(r) (Kalajdzievski 2023) or alpha / r (Hu et al. 2021)."""
    return lambda rank: alpha / (math.sqrt(rank) if kind == "rslora" else rank)


def split(state: StateDict) -> dict[str, Factors]:
    """The factors of an adapter, by module, in the order of the names.

    Raises:
        ValueError: a tensor is no LoRA factor, lacks its other half, or the two do not fit.
    """
    modules = sorted({name.removesuffix(_A).removesuffix(_B) for name in state})
    if any(module + _A not in state or module + _B not in state for module in modules) or len(state) != 2 * len(
        modules
    ):
        odd = next(n for n in state if not n.endswith((_A, _B)) or _other(n) not in state)
        raise ValueError(f"{odd!r} is no LoRA factor with its other half beside it")
    made = {module: Factors(state[module + _B], state[module + _A]) for module in modules}
    for module, (b, a) in made.items():
        if b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0]:
            raise ValueError(f"{module!r}: factors of {tuple(b.shape)} and {tuple(a.shape)} do not multiply")
    return made


def _other(name: str) -> str:
    return name.removesuffix(_A) + _B if name.endswith(_A) else name.removesuffix(_B) + _A


def join(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The adapter that `split` gives these factors of."""
    return {name: tensor for module, f in factors.items() for name, tensor in ((module + _A, f.a), (module + _B, f.b))}


def whole(adapter: StateDict, base_delta: StateDict) -> dict[str, Tensor]:
    """Both as one state, for whoever takes a model as one; `parts` takes it apart."""
    return {**adapter, **{_BASE + name: tensor for name, tensor in base_delta.items()}}


def parts(state: StateDict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The adapter and the base delta (maybe empty) that `whole` put together."""
    base_delta = {name.removeprefix(_BASE): tensor for name, tensor in state.items() if name.startswith(_BASE)}
    return {name: tensor for name, tensor in state.items() if not name.startswith(_BASE)}, base_delta


def gate_name(module: str) -> str:
    """The name of a module's gate in an adapter: (1, d_in), beside its factors."""
    return module + _GATE


def module_of(name: str) -> str:
    """The module that a tensor of an adapter is of."""
    return name.removesuffix(_A).removesuffix(_B).removesuffix(_GATE)


def is_gate(name: str) -> bool:
    """Whether a tensor of an adapter is a gate, which weighs its product by the input (`apiary.models.gates`)."""
    return name.endswith(_GATE)


def ungated(adapter: StateDict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The adapter without gates, and its gates by module."""
    gates = {name.removesuffix(_GATE): tensor for name, tensor in adapter.items() if is_gate(name)}
    return {name: tensor for name, tensor in adapter.items() if not is_gate(name)}, gates


def is_b(name: str) -> bool:
    """Whether a tensor of an adapter is a factor B, by its name (a shape cannot tell when d_out = r)."""
    return name.endswith(_B)


def only_a(state: StateDict) -> dict[str, Tensor]:
    """The factors A of an adapter: what travels where clients keep B to themselves."""
    return {name: tensor for name, tensor in state.items() if not is_b(name)}


def stack(parts: Sequence[Factors], weights: Sequence[float] | None = None) -> Factors:
    """The factors of sum_k w_k B_k A_k, side by side; exact, of rank sum_k r_k.

    The weights go into B alone: in both they would count squared.
    """
    weights = [1.0] * len(parts) if weights is None else weights
    b = torch.cat(
        [part.b if weight == 1.0 else part.b * weight for part, weight in zip(parts, weights, strict=True)], 1
    )
    return Factors(b, torch.cat([part.a for part in parts]))


def change(start: Factors, delta: Factors) -> Factors:
    """The factors of (B + dB)(A + dA) - B A, of rank 2 r.

    As dB (A + dA) + B dA, in which nothing large is subtracted from anything large.
    """
    return Factors(torch.cat([delta.b, start.b], 1), torch.cat([start.a + delta.a, delta.a]))


def inner(x: Factors, y: Factors) -> float:
    """The Frobenius inner product <B_x A_x, B_y A_y> = tr[(B_x^T B_y)(A_y A_x^T)], summed in float64."""
    return float(((x.b.T.double() @ y.b.double()) * (x.a.double() @ y.a.T.double())).sum())


def norm(x: Factors) -> float:
    """The Frobenius norm of the product."""
    return math.sqrt(max(0.0, inner(x, x)))


def gram(parts: Sequence[Factors]) -> Tensor:
    """All inner products of n matrices of one module, (n, n) float64; O(R^2 (d_out + d_in)) with R the sum of ranks."""
    wide = stack(parts)
    terms = (wide.b.T.double() @ wide.b.double()) * (wide.a.double() @ wide.a.T.double())
    owner = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([part.rank for part in parts]))
    pick = torch.nn.functional.one_hot(owner, len(parts)).double()  # (R, n)
    return pick.T @ terms @ pick


def change_gram(start: Factors, deltas: Sequence[Factors]) -> Tensor:
    """All inner products of the changes (B + dB_k)(A + dA_k) - B A, (n, n) float64.

    As `gram` of each `change`, whose rank is 2 r_k, in a quarter of the work: the half B dA_k of a change has the same
    B for all, so that r x r products do for what it meets.

    Args:
        start: B and A.
        deltas: dB_k and dA_k; of ranks r_k, they change the leading columns of B and rows of A.
    """
    moved = [Factors(d.b, start.a[: d.rank] + d.a) for d in deltas]  # a change is this and B dA_k
    b = start.b.double()
    half = b.T @ b / 2
    pad = torch.nn.functional.pad
    shifts = torch.stack([pad(d.a.double(), (0, 0, 0, start.rank - d.rank)) for d in deltas])  # (n, r, d_in)
    seen = torch.stack([(b.T @ m.b.double()) @ m.a.double() for m in moved]) + half @ shifts
    rest = seen.flatten(1) @ shifts.flatten(1).T
    return gram(moved) + rest + rest.T


def svd(x: Factors, rank: int | None = None) -> Svd:
    """The singular values and vectors of the product: the `rank` largest, or all min(r, d_out, d_in) of them.

    By QR of both factors and the SVD of an r x r matrix: O(r^2 (d_out + d_in) + r^3). Equal to the SVD of the dense
    product, which costs O(d_out d_in min(d_out, d_in)). Q stays as Householder reflections, which are applied to the
    vectors that are asked for: for few of them that is a third of the work.
    """
    left, right = torch.geqrf(x.b), torch.geqrf(x.a.T)
    u, s, vt = torch.linalg.svd(left.a[: x.rank].triu() @ right.a[: x.rank].triu().T, full_matrices=False)
    return Svd(_turned(*left, u[:, :rank]), s[:rank], _turned(*right, vt[:rank].T).T.contiguous())


def _turned(reflections: Tensor, tau: Tensor, x: Tensor) -> Tensor:
    """Q x, for Q as `torch.geqrf` gives it."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, len(reflections) - len(x)))
    return torch.ormqr(reflections[:, : len(tau)], tau, padded).contiguous()


def balanced(x: Svd, rank: int, floor: float = 0.0) -> Factors:
    """Factors of rank `rank`: the best approximation in the Frobenius norm (Eckart and Young 1936), split evenly.

    Column i of B and row i of A share the singular value: both have the norm sqrt(s_i). A row of A is never shorter
    than `floor`, though, and its column of B is the shorter for it: where s_i is 0, as in a new adapter, B still gets a
    gradient. Leading columns and rows are themselves the best factors of their rank. Missing directions are zero.
    """
    kept = min(rank, len(x.s))
    root = x.s[:kept].sqrt()
    long = root.clamp_min(floor)
    b = torch.where(long > 0, x.s[:kept] / long.clamp_min(torch.finfo(long.dtype).tiny), 0.0) * x.u[:, :kept]
    return resize(Factors(b, long[:, None] * x.vt[:kept]), rank)


def resize(x: Factors, rank: int) -> Factors:
    """The leading `rank` columns of B and rows of A; zeros where there are fewer."""
    more = rank - x.rank
    if more <= 0:
        return Factors(x.b[:, :rank], x.a[:rank])
    pad = torch.nn.functional.pad
    return Factors(pad(x.b, (0, more)), pad(x.a, (0, 0, 0, more)))


def is_half(adapter: StateDict) -> bool:
    """Whether the adapter has no B of its own, as what travels where each client keeps a B of its own."""
    return not any(tensor.any() for name, tensor in adapter.items() if is_b(name))
