"""Steps that drop rows said twice: the same, or nearly the same."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import Field

from apiary.core.seeds import derive_seed
from apiary.data.examples import Example
from apiary.data.turns import Turn, said
from client.curation.pipeline import STEPS, Context, Row, Step, StepResult, by_reason
from client.curation.steps.budget import Share
from client.curation.text import ngrams, normalise, response, spoken, words

if TYPE_CHECKING:
    from datasketch import MinHash

_FEW_ROWS = 10  # a run of words in so few rows is never boilerplate

Shingles = frozenset[tuple[str, ...]]


class Said(NamedTuple):
    """What a row says, as it is compared: runs of words, and the answer's words."""

    shingles: Shingles
    answer: tuple[str, ...]


@STEPS.register("duplicates")
def duplicates() -> Step:
    """Drops every row that says the same as an earlier one, but for case, white space and Unicode form.

    Rows that differ in their tools, or in which of the answers are trained, are not the same: each teaches what the
    other does not.
    """

    def apply(rows: Sequence[Row], context: Context) -> StepResult:
        first: dict[Hashable, int] = {}
        for index, example in rows:
            first.setdefault(_normalised(example), index)
        stay = set(first.values())
        return by_reason(rows, {index: "says the same as an earlier row" for index, _ in rows if index not in stay})

    return Step(apply, pointwise=False)


def _normalised(example: Example) -> Hashable:
    turns = [
        (turn.role, normalise(turn.text), turn.trained, normalise(turn.thinking), turn.name, _normalised_calls(turn))
        for turn in example.turns
    ]
    return tuple(turns), normalise(example.tools)


def _normalised_calls(turn: Turn) -> Hashable:
    """The calls, whose arguments are the same in any order and layout; a capital letter in one may be meant."""
    return tuple((call.name, _canonical(call.arguments)) for call in turn.calls)


def _canonical(arguments: str) -> str:
    try:
        return json.dumps(json.loads(arguments), sort_keys=True)
    except (ValueError, RecursionError):
        return arguments


@STEPS.register("near_duplicates")
def near_duplicates(
    threshold: Share = 0.7,
    permutations: Annotated[int, Field(ge=16)] = 128,
    n: Annotated[int, Field(ge=1)] = 5,
    keep: Literal["longest", "first"] = "longest",
    boilerplate: Share = 0.1,
) -> Step:
    """Keeps one of each group of rows that share most of their runs of `n` words.

    Rows are compared by the Jaccard similarity of their sets of runs. MinHash with banding (Broder 1997) proposes
    pairs, the exact similarity decides, and pairs that share a row are one group. A row of fewer than `n` words is
    compared as a whole. Runs in more than the `boilerplate` share of rows, such as an instruction that stands before
    every input, are left out unless a row has no others. The answers must be alike too: several questions about one
    long text are not the same row.

    Args:
        threshold: least Jaccard similarity of a pair.
        permutations: hash functions of MinHash; more of them miss fewer pairs.
        n: words in a run.
        keep: the longest row of a group (of equal ones the first), or the first.
        boilerplate: share of rows above which a run is not compared; 1 compares all.
    """

    def apply(rows: Sequence[Row], context: Context) -> StepResult:
        shingles = shingle_sets([example for _, example in rows], n, boilerplate)
        groups: dict[Said, list[int]] = {}  # rows that say the same need no comparing
        for place, (runs, (_, example)) in enumerate(zip(shingles, rows, strict=True)):
            groups.setdefault(Said(runs, _response(example)), []).append(place)
        distinct = list(groups)
        seed = derive_seed(context.seed, context.client, "curate", "minhash") % 2**32
        pairs = _similar(distinct, threshold, permutations, seed)
        reasons: dict[int, str] = {}
        for members in components(len(distinct), pairs):
            places = [place for member in members for place in groups[distinct[member]]]
            best = min(places, key=lambda p: (-_length(rows[p][1]) if keep == "longest" else 0, p))
            reasons |= {rows[place][0]: f"nearly the same as a {_KEPT[keep]} row" for place in places if place != best}
        return by_reason(rows, reasons)

    return Step(apply, pointwise=False)


_KEPT = {"longest": "longer or earlier", "first": "earlier"}


def _length(example: Example) -> int:
    return sum(len(said(turn)) for turn in example.turns)


def shingle_sets(examples: Sequence[Example], n: int, boilerplate: float = 1.0) -> list[Shingles]:
    """The set of runs of `n` words of each row, without those in more than a share of the rows."""
    sets = [_shingles(example, n) for example in examples]
    counts = Counter(run for found in sets for run in found)
    most = max(_FEW_ROWS, boilerplate * len(examples))
    return [frozenset(run for run in found if counts[run] <= most) or found for found in sets]


def _shingles(example: Example, n: int) -> Shingles:
    tokens = words(spoken(example))
    return frozenset(ngrams(tokens, n) or [tuple(tokens) or (normalise(spoken(example)),)])


def jaccard(a: Shingles, b: Shingles) -> float:
    """Common elements over all elements."""
    return len(a & b) / len(a | b)


def minhash(shingles: Iterable[tuple[str, ...]], permutations: int, seed: int) -> MinHash:
    """The MinHash signature of a set (Broder 1997)."""
    from datasketch import MinHash

    signature = MinHash(num_perm=permutations, seed=seed, hashfunc=_hash)
    signature.update_batch(["\x1f".join(run).encode("utf-8", "surrogatepass") for run in shingles])
    return signature


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "big")


def _similar(rows: Sequence[Said], threshold: float, permutations: int, seed: int) -> Iterator[tuple[int, int]]:
    """Pairs of at least the Jaccard similarity `threshold`, almost all of them."""
    from datasketch import MinHashLSH

    # Pairs are verified, so a false one costs a comparison and a missed one is lost for good.
    index = MinHashLSH(threshold=threshold, num_perm=permutations, weights=(0.1, 0.9))
    for place, (shingles, answered) in enumerate(rows):
        signature = minhash(shingles, permutations, seed)
        for other in sorted(index.query(signature)):
            alike = _alike(answered, rows[other].answer, threshold)
            if alike and jaccard(shingles, rows[other].shingles) >= threshold:
                yield other, place
        index.insert(place, signature)


def _response(example: Example) -> tuple[str, ...]:
    text = response(example)
    return tuple(words(text) or normalise(text).split())


def _alike(a: tuple[str, ...], b: tuple[str, ...], threshold: float) -> bool:
    """Whether one answer is the beginning of the other, or they share most of their words."""
    if a[: len(b)] == b or b[: len(a)] == a:
        return True
    return jaccard(frozenset(zip(a)), frozenset(zip(b))) >= threshold


def components(count: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """The connected components of a graph of `count` nodes, each in rising order (union-find)."""
    parent = list(range(count))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for a, b in pairs:
        parent[root(max(a, b))] = root(min(a, b))
    members: dict[int, list[int]] = {}
    for node in range(count):
        members.setdefault(root(node), []).append(node)
    return list(members.values())
