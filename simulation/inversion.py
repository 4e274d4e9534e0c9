"""The gradient-inversion drill: what one step on a few rows gives away of their tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apiary.config.schema import ContinualConfig, CurateConfig, RunConfig
from apiary.core import lora
from apiary.core.counts import EXACT
from apiary.core.messages import Payload, Visit
from apiary.core.tensors import StateDict
from apiary.data import injection
from apiary.data.batches import Corpus
from apiary.models import adapters
from apiary.models.adapters import LanguageModel
from apiary.privacy.audit import inversion
from client.worker import Worker
from simulation import replay
from simulation.replay import Bench
from strategies.local import PLAIN

_ALIKE = 1e-2  # relative; inputs of one token at two places may differ by rounding in bfloat16
_CHUNK = 2048  # tokens of the vocabulary in one pass


def token_inputs(lm: LanguageModel) -> tuple[tuple[str, ...], Tensor] | None:
    """The adapted modules whose common input follows from a token alone, and that input of each token, (V, d) float32.

    None where there is no such module: with positions added to the embeddings, say, or where the first layers are not
    adapted. Found by asking the model: the token must have the same input behind others and at another place.
    """
    modules = tuple(lora.split(dict(lm.adapter)))
    ids = (
        torch.tensor([[5, 6, 7], [8, 9, 7], [7, 5, 6]], device=lm.device)
        % lm.model.get_input_embeddings().weight.shape[0]
    )
    seen = _inputs(lm, modules, ids)
    found = []
    for name, x in seen.items():
        here, behind, first = x[0, 2], x[1, 2], x[2, 0]
        size = float(here.norm()) * _ALIKE
        if float((here - behind).norm()) <= size and float((here - first).norm()) <= size:
            found.append(name)
    if not found:
        return None
    width = seen[found[0]].shape[-1]
    same = tuple(name for name in found if seen[name].shape[-1] == width and torch.equal(seen[name], seen[found[0]]))
    every = torch.arange(len(lm.tokenizer), device=lm.device)
    parts = [_inputs(lm, same[:1], part[:, None])[same[0]][:, 0] for part in every.split(_CHUNK)]
    return same, torch.cat(parts)


def _inputs(lm: LanguageModel, modules: Sequence[str], ids: Tensor) -> dict[str, Tensor]:
    """What each module is given for these tokens, (b, t, d) float32 on the CPU."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[object, tuple[Tensor, ...]], None]:
        def hook(_: object, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = inputs[0].detach().float().cpu()

        return hook

    hooks = [lm.model.get_submodule(name).register_forward_pre_hook(note(name)) for name in modules]
    try:
        with torch.inference_mode(), adapters.autocast(lm):
            lm.model(input_ids=ids, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def one_step(config: RunConfig, noise: float | None, rows: int) -> RunConfig:
    """The run's settings for a visit of one plain gradient step in which every one of `rows` rows takes part.

    It is the worst case for the rows: with `adamw`, or after several steps, an update is no gradient any more.

    Args:
        config: the run.
        noise: the run's noise multiplier; None without privacy.
        rows: of the step.
    """
    train = {"optimizer": "sgd", "lr": 1.0, "schedule": "constant", "warmup": 0.0, "steps": 1, "epochs": None}
    train |= {"accumulate": 1, "batch_tokens": rows * config.prompt.max_tokens, "weight_decay": 0.0, "penalties": ()}
    privacy = {"batch_rows": rows, "noise_multiplier": noise, "epsilon": 1e9}
    return config.model_copy(
        update={
            "train": config.train.model_copy(update=train),
            "privacy": config.privacy.model_copy(update=privacy if noise is not None else {}),
            "curate": CurateConfig(),
            "continual": ContinualConfig(),
        }
    )


def drill(
    bench: Bench,
    start: StateDict,
    noise: float | None,
    sizes: Sequence[tuple[int, int]],
    folder: Path,
    seed: int,
) -> dict[int, list[tuple[float, float]]]:
    """By batch size, the token recovery of some batches of the client's rows, each with its reference.

    The reference is what the updates of the other batches recover of this one. Rows of a client share common words, and
    the guesses of pure noise fall on some tokens rather than on others, so a uniform guess would be too low a bar.
    Takes what `read_batches` does.

    Returns:
        Pairs (by the batch's own update, by those of the others), NaN for the second of a single batch; nothing where
        no adapted layer has an input that follows from a token alone, or no A is trained.
    """
    found: dict[int, list[tuple[float, float]]] = {}
    for rows, shares in read_batches(bench, start, noise, sizes, folder, seed).items():
        others = [float(np.delete(row, i).mean()) if len(row) > 1 else math.nan for i, row in enumerate(shares)]
        found[rows] = list(zip(shares.diagonal().tolist(), others, strict=True))
    return found


def read_batches(
    bench: Bench,
    start: StateDict,
    noise: float | None,
    sizes: Sequence[tuple[int, int]],
    folder: Path,
    seed: int,
) -> dict[int, NDArray[np.float64]]:
    """By batch size, which share of each batch's tokens each batch's update gives away.

    Args:
        bench: the client and its run.
        start: the adapter that the step begins with, with what it adds to the base.
        noise: the run's noise multiplier; None without privacy.
        sizes: rows of a batch, and how many batches are drawn.
        folder: for what the copies keep; new.
        seed: of the batches and the copies' keys.

    Returns:
        (k, k), row i of the i-th batch, column j by the update of the j-th; nothing where no adapted layer has an input
        that follows from a token alone, or no A is trained.
    """
    lm = bench.lm
    bench = bench._replace(counts=EXACT)  # every row of a batch is in its step, whatever the site plans with
    number = next((n for n in (1, 2) if bench.config.adapter.trained(n) != "b"), None)
    adapters.set_adapter(lm, start)
    known = token_inputs(lm)
    if number is None or known is None:
        return {}
    modules, inputs = known
    whole = injection.encode_training(bench.client.train, bench.worker.template, lm.tokenizer, bench.config.prompt)
    usable = [row for i, row in enumerate(bench.client.train) if i not in whole.dropped]
    common = _in_every(whole)
    rng = np.random.default_rng(seed)
    found: dict[int, NDArray[np.float64]] = {}
    for rows, trials in sizes:
        seen: list[tuple[np.ndarray, np.ndarray]] = []  # the scores by an update, and the tokens of its batch
        worker = Worker(one_step(bench.config, noise, rows), PLAIN)
        for trial in range(trials):
            batch = [usable[i] for i in rng.choice(len(usable), rows, replace=False)]
            copy = replay.site(bench, batch, folder / f"{rows}-{trial}", seed)
            answer = worker.train(copy, number, Payload(*lora.parts(start)))
            if not isinstance(answer, Visit):
                continue
            factors = lora.split(answer.update.delta)
            scores = inversion.presence(inputs, torch.cat([factors[name].a for name in modules]))
            ids = injection.encode_training(batch, worker.template, lm.tokenizer, bench.config.prompt).ids
            if len(np.setdiff1d(ids, common)):
                seen.append((scores, np.unique(ids)))
        if seen:
            found[rows] = np.array([[inversion.recovery(scores, ids, common) for scores, _ in seen] for _, ids in seen])
    return found


def _in_every(corpus: Corpus) -> np.ndarray:
    """Ids of the tokens that all rows have: what the template writes, which everybody knows."""
    each = [np.unique(corpus.ids[a:b]) for a, b in itertools.pairwise(corpus.offsets)]
    ids, counts = np.unique(np.concatenate(each), return_counts=True)
    return np.asarray(ids[counts == len(each)])
