"""Partitioners of flwr-datasets at work, in a process of their own where a simulation needs them once.

What flwr-datasets imports (pandas, pyarrow, matplotlib) takes 140 MB, which a process that has imported it never gives
back; a simulation asks one question of it, at its start. So the first question goes to a process that ends with the
answer. Whoever asks again imports it after all, which then saves the two seconds that such a process takes to start.

Runs as a file, and so imports nothing of Apiary: a question is pickled on stdin, the answer on stdout, and nobody else
can write to either.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Indices: TypeAlias = npt.NDArray[np.int64]

_asked = 0  # questions of this process


class Question(NamedTuple):
    """How to cut rows."""

    attempts: Sequence[tuple[str, Sequence[Any]]]  # partitioners by class and arguments, tried one after the other
    order: Indices  # the rows, in the order in which they are cut
    codes: Indices | None = None  # by row, the value of the column that decides, which a partitioner knows as "code"


def shares(question: Question) -> list[Indices] | None:
    """The rows of each client, ascending, by the first partitioner that finds a way; None where none does.

    Raises:
        RuntimeError: the process ended without an answer.
    """
    global _asked
    _asked += 1
    if _asked > 1 or "flwr_datasets" in sys.modules:
        return _shares(question)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-P", "-B", __file__],
        input=pickle.dumps(tuple(question)),
        capture_output=True,
        env=environment,
    )
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"the rows could not be cut by flwr-datasets: {' '.join(last)}")
    answer: list[Indices] | None = pickle.loads(done.stdout)
    return answer


def _shares(question: Question) -> list[Indices] | None:
    from datasets import Dataset
    from flwr_datasets import partitioner as partitioners

    attempts, order, codes = question
    columns = {"row": order} if codes is None else {"row": order, "code": codes[order]}
    for name, arguments in attempts:
        partitioner = getattr(partitioners, name)(*arguments)
        partitioner.dataset = Dataset.from_dict(columns)
        with warnings.catch_warnings():  # about redraws and small shares, which are told as errors elsewhere
            warnings.simplefilter("ignore")
            try:
                found = [partitioner.load_partition(i)["row"][:] for i in range(partitioner.num_partitions)]
            except ValueError:  # it says so that it finds no way
                continue
        return [np.sort(np.asarray(share, dtype=np.int64)) for share in found]
    return None


def _answer() -> None:
    """Answer the question on stdin; what a library prints goes to stderr."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    pickle.dump(_shares(Question(*pickle.load(sys.stdin.buffer))), out)
    out.flush()


if __name__ == "__main__":
    _answer()
