"""What a run will cost, told before it starts: optimizer steps, bytes, memory and seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from apiary.config.schema import AdapterConfig, ModelConfig, RunConfig
from apiary.core import lora
from apiary.core.lora import is_b
from apiary.core.tensors import generator, threads
from apiary.data.tokenization import Batch, Corpus, collate, plan_batches
from apiary.models.adapters import LanguageModel, autocast, pad_id
from apiary.models.base import resolve_dtype
from apiary.models.loss import row_losses, to_device
from apiary.tracking import environment
from apiary.transport.from_config import configured_codec
from strategies.from_config import method_from_config

_SCALAR_HEAD = 28  # of a message of scalars: version, codec, digest, checksum
_SCALAR_BYTES = 5.4  # a float32 and how many of the pool were skipped before it, one or two bytes
_TRIAL_SECONDS = 20.0  # a full batch is only run where it should take less


class Work(NamedTuple):
    """Optimizer steps. Without all clients in each round the total is what is expected."""

    per_epoch: tuple[int, ...]  # of each client
    per_round: tuple[int, ...]  # of each client
    cohort: int  # clients asked in a round
    total: int  # of all clients in all rounds
    serial: int  # one after the other, in all rounds: those of the client with the most


class Traffic(NamedTuple):
    """Bytes of adapters on the wire; names, counts and headers add a few kilobytes. Of topk it is the most."""

    down: int  # what a client of mean rank receives in the mean round after the first
    up: int  # what it sends back
    grows: bool  # whether later rounds receive more, and earlier ones less
    evaluations: int  # times that as many clients as a round has are asked to measure
    total: int  # both ways, all clients, the whole run


class Trial(NamedTuple):
    """One forward and backward pass, tried out."""

    activation_bytes: int  # kept for the backward pass of a batch of `train.batch_tokens`
    tokens: int  # padded tokens of the pass that was measured
    seconds: float  # a full batch, forward and backward


def plan_work(config: RunConfig, corpora: Sequence[Corpus]) -> Work:
    """The optimizer steps that a configuration asks of clients with these corpora."""
    train, strategy = config.train, config.strategy
    per_epoch, per_round = [], []
    for corpus in corpora:
        rng = generator(0, "", "epoch", 0)
        batches = len(plan_batches(corpus.lengths, train.batch_tokens, rng))
        per_epoch.append(math.ceil(batches / train.accumulate))
        if train.epochs is None:
            per_round.append(train.steps or 1)
        else:
            per_round.append(max(1, math.ceil(train.epochs * batches / train.accumulate)))
    n = len(corpora)
    cohort = strategy.cohort_size(n)
    total = round(config.rounds * cohort * sum(per_round) / max(n, 1))
    return Work(tuple(per_epoch), tuple(per_round), cohort, total, config.rounds * max(per_round, default=1))


def plan_traffic(config: RunConfig, lm: LanguageModel, work: Work) -> Traffic:
    """The bytes that adapters take on the wire.

    A device's own rank (`adapter.ranks` = "memory") is not known here, and counts as the server's.
    """
    adapter, rounds = config.adapter, config.rounds
    method = method_from_config(config)
    up, down = configured_codec(config, "up", method.local.codec), configured_codec(config, "down")
    part = _mean_rank(adapter) / adapter.rank
    sizes = {n: round(part * p.numel()) for n, p in lm.adapter.items() if method.local.shares(n)}
    if method.scalars:
        sizes = {"scalars": method.scalars}
        steps = sum(work.per_round) / len(work.per_round)
        answer = round(min(4 * method.scalars, _SCALAR_HEAD + _SCALAR_BYTES * steps))
    else:
        answer = _mean([_moved(sizes, adapter, number, up.most) for number in (1, 2)])
    whole = 4 * sum(sizes.values())
    change = whole if down.whole else _mean([_moved(sizes, adapter, number, down.most) for number in (1, 2)])
    extra = whole if method.extra else 0
    measured = _evaluations(config)
    ranks = [method.base_rank(number, work.cohort, _mean_rank(adapter)) for number in range(rounds + 1)]
    base = [_base_bytes(lm, rank) for rank in ranks]  # by finished rounds
    # A change travels once, with the next message of any kind; before the first there is A alone, for B is zero.
    first = 4 * sum(n for name, n in sizes.items() if not is_b(name))
    sent = whole * (rounds + len(measured)) if down.whole else first + change * (rounds - 1 + bool(measured))
    sent += sum(base[:-1]) + sum(base[number] for number in measured)
    return Traffic(
        down=change + extra + _mean(base[1:-1] or [0]),
        up=answer,
        grows=base[-1] > base[1],
        evaluations=len(measured),
        total=work.cohort * (sent + (extra + answer) * rounds),
    )


def _mean(sizes: Sequence[int]) -> int:
    return round(sum(sizes) / len(sizes))


def _mean_rank(adapter: AdapterConfig) -> float:
    ranks = adapter.ranks if isinstance(adapter.ranks, tuple) else ()
    return sum(ranks) / len(ranks) if ranks else adapter.rank


def _moved(sizes: Mapping[str, int], adapter: AdapterConfig, number: int, most: Callable[[int], int]) -> int:
    """Bytes of a coded change after round `number`; a factor that rests travels for nothing."""
    factors = adapter.trained(number)
    return sum(most(n) for name, n in sizes.items() if factors == "both" or is_b(name) == (factors == "b"))


def _evaluations(config: RunConfig) -> list[int]:
    """The rounds after which clients are asked to measure: 0, every n-th and the last."""
    every = config.evaluate.every
    if not (config.scores_from_clients and every):
        return []
    return sorted({*range(0, config.rounds + 1, every), config.rounds})


def _base_bytes(lm: LanguageModel, rank: float) -> int:
    """Bytes of factors of this rank in the base, which methods that add to it send with every message."""
    sides = [(len(f.b), f.a.shape[1]) for f in lora.split(lm.adapter).values()]
    return round(4 * sum(min(rank, *side) * sum(side) for side in sides))


def adapter_size(lm: LanguageModel) -> int:
    """Trained parameters."""
    return sum(parameter.numel() for parameter in lm.adapter.values())


def state_bytes(config: RunConfig) -> tuple[int, str]:
    """Bytes that training takes for each entry of the adapter, and what they are."""
    if method_from_config(config).local.gradient_free:
        return 12, "adapter and the sum of its moves"
    return (8, "adapter and gradient") if config.train.optimizer == "sgd" else (16, "adapter, gradient and Adam")


def base_bytes(lm: LanguageModel) -> int:
    """Bytes of the frozen weights and buffers as they are held, each storage counted once."""
    adapter = {id(parameter) for parameter in lm.adapter.values()}
    held = [*lm.model.parameters(), *lm.model.buffers()]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in held
        if id(tensor) not in adapter
    }
    return sum(storages.values())


def weights_bytes(config: ModelConfig, device: torch.device) -> int | None:
    """About what a base's weights will take, from its config.json alone; None where unknown.

    Nothing of the weights is read, so this is safe for a model that would not fit.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if config.name.startswith("builtin:"):
        return None
    per_entry = {"int8": 1.0, "nf4": 0.55}.get(config.quantization, float(resolve_dtype(config, device).itemsize))
    try:
        settings = AutoConfig.from_pretrained(config.name, revision=config.revision)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings)
    except Exception:  # what is wrong is said, better, when the model is loaded
        return None
    entries: int = sum(parameter.numel() for parameter in model.parameters())
    return round(per_entry * entries)


def device_bytes(device: torch.device) -> int | None:
    """The memory of a device; for the CPU that of this machine. None where it is unknown."""
    if device.type == "cuda":
        total: int = torch.cuda.mem_get_info(device)[1]
        return total
    if device.type == "mps":
        most: int = torch.mps.recommended_max_memory()
        return most
    memory: int | None = environment.machine(gpu=False)["memory_bytes"]
    return memory


def try_out(lm: LanguageModel, corpus: Corpus, config: RunConfig) -> Trial:
    """Time and memory of a forward and backward pass, from real ones.

    An eighth of a full batch is run first and scaled up; the full one follows where it is quick.
    The adapter is left as it was.
    """
    plan = plan_batches(corpus.lengths, config.train.batch_tokens, generator(0, "forecast"))
    full = max(plan, key=lambda rows: _padded(corpus, rows))
    part = full[: max(1, len(full) // 8)]
    ratio = _padded(corpus, full) / _padded(corpus, part)
    with threads(config.train.threads):
        saved, seconds = _best_pass(lm, _batch(lm, corpus, part))
        if ratio == 1.0 or seconds * ratio > _TRIAL_SECONDS:
            return Trial(round(saved * ratio), _padded(corpus, part), seconds * ratio)
        saved, seconds = _best_pass(lm, _batch(lm, corpus, full))
    return Trial(saved, _padded(corpus, full), seconds)


def _best_pass(lm: LanguageModel, batch: Batch) -> tuple[int, float]:
    """The quickest of three: the first of a shape pays for its kernels, and others use the machine too."""
    return min((_pass(lm, batch) for _ in range(3)), key=lambda run: run[1])


def _batch(lm: LanguageModel, corpus: Corpus, rows: np.ndarray) -> Batch:
    return to_device(collate(corpus, rows, pad_id(lm.tokenizer)), lm.device)


def _padded(corpus: Corpus, rows: np.ndarray) -> int:
    return int(len(rows) * corpus.lengths[rows].max())


def _pass(lm: LanguageModel, batch: Batch) -> tuple[int, float]:
    """Bytes kept for the backward pass, weights aside, and seconds of both passes."""
    held = [*lm.model.parameters(), *lm.model.buffers()]
    weights = {tensor.untyped_storage().data_ptr() for tensor in held}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    began = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(lm):
        loss = row_losses(lm.model, batch).sum()
    torch.autograd.backward(loss)
    if lm.device.type == "cuda":  # it works on behind our back
        torch.cuda.synchronize(lm.device)
    seconds = time.perf_counter() - began
    for parameter in lm.adapter.values():
        parameter.grad = None
    return sum(kept.values()), seconds
