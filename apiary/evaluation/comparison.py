"""Metrics as functions, and the table: the federated model and its baselines on the same held-out examples."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from apiary.config.schema import RunConfig, TrainConfig
from apiary.core.errors import UserError
from apiary.core.tensors import StateDict, derive_seed
from apiary.data import structured, tokenization
from apiary.data.batches import Corpus
from apiary.data.examples import Example, answer
from apiary.data.federation import Federation
from apiary.data.templates import Thinking
from apiary.data.tokenization import Template
from apiary.evaluation import intervals
from apiary.models.adapters import LanguageModel, fresh_adapter, set_adapter
from apiary.models.inference import ModelProbe, check_decoding, text_of

Floats = NDArray[np.float64]
_TUNED_WIDTH = 256  # of the widest base that the default learning rate was chosen on (docs/tuning.md)


class HeldOut(NamedTuple):
    """Held-out examples, ready to be scored and answered."""

    examples: tuple[Example, ...]
    corpus: Corpus
    questions: tuple[list[int], ...]  # prompt token ids; none where answers are not asked for, [] where nothing asks
    answers: tuple[str, ...]
    left_out: int = 0  # of those drawn, the ones that cannot be used
    deciding: HeldOut | None = None  # other examples, by which the server decides which round or run is best
    thinks: tuple[bool, ...] = ()  # whether each question asks for thinking before the answer
    thinking: Thinking | None = None  # what the template writes around thinking


class Measured(NamedTuple):
    """One adapter on the held-out examples, example by example."""

    nats: Floats  # (n,)
    tokens: Floats  # (n,) response tokens
    correct: Floats | None  # (n,) 1.0 where the greedy answer matches exactly; NaN where nothing is asked
    texts: tuple[str, ...] = ()

    @property
    def loss(self) -> float:
        """Nats per response token."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def accuracy(self) -> float | None:
        """Share of exact matches among the examples that ask something."""
        return None if (hits := self.hits) is None else float(hits.mean())

    @property
    def hits(self) -> Floats | None:
        """As `correct`, of the examples that ask something; None where there are none."""
        found = np.empty(0) if self.correct is None else self.correct[~np.isnan(self.correct)]
        return found if len(found) else None


def prepare(examples: Sequence[Example], template: Template, lm: LanguageModel, config: RunConfig) -> HeldOut:
    """At most `evaluate.max_examples` of the examples, drawn evenly, tokenised for scoring and, if need be, answering.

    Examples that the template cannot write, or whose first answer or last question does not fit `prompt.max_tokens`,
    are left out of both and counted: every row of the table is over the same ones.

    Raises:
        UserError: the model has fewer positions than `prompt.max_tokens`, or cannot decode the answers that are asked
            for.
    """
    check_positions(lm, config)
    if config.evaluate.generate:
        check_decoding(lm)  # else it would fail after the training
    drawn = evenly(examples, config)
    usable = [e for e in drawn if tokenization.encode(e, template, lm.tokenizer, config.prompt)]
    questions: list[list[int]] = []
    if config.evaluate.generate:
        asked = [(e, ids) for e in usable if (ids := _question(e, template, lm, config)) is not None]
        usable, questions = [e for e, _ in asked], [ids for _, ids in asked]
    corpus = tokenization.encode_all(usable, template, lm.tokenizer, config.prompt)
    left_out = len(drawn) - len(usable)
    if not config.evaluate.generate:
        return HeldOut(tuple(usable), corpus, (), tuple(map(answer, usable)), left_out)
    answers = tuple(_expected(example, template, lm, config) for example in usable)
    thinks = tuple(bool(example.turns[-1].thinking) for example in usable)
    return HeldOut(
        tuple(usable), corpus, tuple(questions), answers, left_out, thinks=thinks, thinking=template.thinking
    )


def prepare_apart(
    examples: Sequence[Example], deciding: Sequence[Example], template: Template, lm: LanguageModel, config: RunConfig
) -> HeldOut:
    """As `prepare`, with other examples by which the server decides which round is best.

    Args:
        examples: of the table.
        deciding: of the decision; empty where it is not the server's.
        template: how an example becomes text.
        lm: the model.
        config: the run.

    Raises:
        UserError: the model has too few positions, or no example of the decision can be used.
    """
    held_out = prepare(examples, template, lm, config)
    if not deciding:
        return held_out
    loss_only = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"generate": False})})
    apart = prepare(deciding, template, lm, loss_only)
    if not apart.examples:
        patience = config.evaluate.patience
        key, none = (f"evaluate.patience = {patience}", "0") if patience else ("evaluate.set_apart = true", "false")
        raise UserError(
            f"{key}: none of the {len(deciding)} held-out examples that would decide fits prompt.max_tokens; raise it, "
            f"or set {none}"
        )
    return held_out._replace(deciding=apart)


def ask(examples: Sequence[Example], template: Template, lm: LanguageModel, config: RunConfig) -> list[list[int]]:
    """The prompt of each example (token ids); empty where it asks nothing or does not fit `prompt.max_tokens`."""
    return [_question(example, template, lm, config) or [] for example in examples]


def _question(example: Example, template: Template, lm: LanguageModel, config: RunConfig) -> list[int] | None:
    if all(turn.role == "system" for turn in example.turns[:-1]):
        return []  # text to be continued asks nothing, and nobody could guess how it begins
    try:
        return tokenization.encode_prompt(example, template, lm.tokenizer, config.prompt.max_tokens)
    except UserError:
        return None


def _expected(example: Example, template: Template, lm: LanguageModel, config: RunConfig) -> str:
    """The answer that counts as right.

    One with calls or thinking is what the template writes for it, decoded as generated answers are. What follows the
    thinking is compared, for nobody thinks twice in the same words.
    """
    turn = example.turns[-1]
    written = turn.text
    if turn.calls or turn.thinking:
        whole = config.prompt.model_copy(update={"max_tokens": sys.maxsize})
        encoded = tokenization.encode(example, template, lm.tokenizer, whole)
        if encoded is not None:
            start = int(np.flatnonzero(~encoded.trained)[-1]) + 1  # between two answers something is not trained
            written = text_of(lm, encoded.ids[start:].tolist(), _marks(lm, template.thinking)).strip()
    return after_thinking(written, template.thinking, bool(turn.thinking)) or written


def after_thinking(written: str, thinking: Thinking | None, asked: bool) -> str:
    """What an answer says after its thinking; asked: whether the prompt asked for thinking."""
    return written if thinking is None else thinking.cut(written, asked)[1]


def _marks(lm: LanguageModel, thinking: Thinking | None) -> frozenset[int]:
    """The special tokens that stand around thinking, which decoding would drop."""
    if thinking is None:
        return frozenset()
    added = lm.tokenizer.added_tokens_decoder
    return frozenset(
        int(i) for i, token in added.items() if token.special and any(token.content in mark for mark in thinking)
    )


def data_warnings(
    federation: Federation,
    held_out: HeldOut,
    template: Template,
    lm: LanguageModel,
    config: RunConfig,
    trained: Sequence[Corpus] = (),
) -> list[str]:
    """What encoding cuts and leaves out of all data, a line for each file, what the table lacks, and a doubtful rate.

    Args:
        federation: the data.
        held_out: the examples of the table.
        template: how an example becomes text.
        lm: its tokenizer.
        config: the run.
        trained: the clients' training rows as they are encoded without planted instructions, where they are there.
    """
    clients = federation.clients
    shares = [federation.test, *(client.test for client in clients)]
    if not trained:
        shares += [client.train for client in clients]
    encoded = ((rows, tokenization.encode_all(rows, template, lm.tokenizer, config.prompt)) for rows in shares)
    known = zip((client.train for client in clients), trained, strict=True) if trained else ()
    parts = itertools.chain(encoded, known)
    lines = tokenization.rows_lost(parts, federation.sources, config.prompt.max_tokens)
    if held_out.left_out:
        lines.append(
            f"held-out set: {held_out.left_out} of {held_out.left_out + len(held_out.examples)} examples are not in "
            "the table: the first answer or last question does not fit prompt.max_tokens, or prompt.template "
            "cannot write it"
        )
    if lm.generation.fault:
        lines.append(lm.generation.fault_line)
    if config.prompt.boundary == "structured":
        lines += structured.remarks((row.turns, row.tools) for client in federation.clients for row in client.train)
    return [*lines, *_untuned_rate(lm, config)]


def _untuned_rate(lm: LanguageModel, config: RunConfig) -> list[str]:
    """A line where the default learning rate stands beside a base much wider than those that it was chosen on."""
    default = TrainConfig.model_fields["lr"].default
    width = getattr(lm.model.config.get_text_config(), "hidden_size", 0)
    if config.train.lr != default or width <= _TUNED_WIDTH:
        return []
    return [
        f"train.lr = {default:g} is the default, chosen on bases of {_TUNED_WIDTH} dimensions at most; {lm.name} has "
        f"{width} and may want less, of 1e-4 to 3e-3: try a few (apiary sweep)"
    ]


def check_positions(lm: LanguageModel, config: RunConfig) -> None:
    """Check that the longest example has no more tokens than the model has positions.

    Raises:
        UserError: an example may have more tokens than the model has positions.
    """
    limit = _positions(lm)
    if config.prompt.max_tokens > limit:
        raise UserError(
            f"prompt.max_tokens = {config.prompt.max_tokens}: {lm.name} has {limit} positions; "
            f"lower it to {limit} or less"
        )


def _positions(lm: LanguageModel) -> int:
    limit = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else sys.maxsize


def evenly(examples: Sequence[Example], config: RunConfig) -> list[Example]:
    """A seeded sample without replacement, in the order of the source."""
    limit = config.evaluate.max_examples
    if len(examples) <= limit:
        return list(examples)
    rng = np.random.default_rng(derive_seed(config.seed, "held-out"))
    return [examples[i] for i in sorted(rng.choice(len(examples), limit, replace=False))]


def measure(lm: LanguageModel, adapter: StateDict, held_out: HeldOut, config: RunConfig) -> Measured:
    """Loss, and with `evaluate.generate` exact-match accuracy, of an adapter, which the model holds from then on."""
    set_adapter(lm, adapter)
    nats, tokens = ModelProbe(lm).losses(held_out.corpus)
    if not any(held_out.questions):
        return Measured(nats, tokens.astype(np.float64), None)
    texts = answer_all(lm, held_out.questions, config.evaluate.max_new_tokens, held_out.thinking)
    correct = np.array(
        [
            exact_match(text, answer) or exact_match(after_thinking(text, held_out.thinking, asked), answer)
            for text, answer, asked in zip(texts, held_out.answers, held_out.thinks, strict=True)
        ],
        dtype=np.float64,
    )
    correct[[not ids for ids in held_out.questions]] = np.nan
    return Measured(nats, tokens.astype(np.float64), correct, texts)


def answer_all(
    lm: LanguageModel, questions: Sequence[list[int]], max_new_tokens: int, thinking: Thinking | None = None
) -> tuple[str, ...]:
    """The greedy answer to each prompt (token ids), ending at the model's last position if not before.

    Special tokens are left out, but for the marks of `thinking`, which may be such.
    """
    room = [min(max_new_tokens, _positions(lm) - len(ids)) for ids in questions]
    texts, kept = [""] * len(questions), _marks(lm, thinking)
    for longest in sorted(set(room)):
        chosen = [i for i, tokens in enumerate(room) if tokens == longest]
        given = ModelProbe(lm).generate([questions[i] for i in chosen], longest, kept)
        for i, text in zip(chosen, given, strict=True):
            texts[i] = text
    return tuple(texts)


class Comparison(NamedTuple):
    """The table, and each client's model trained alone."""

    rows: dict[str, Measured]  # by method, in the order of the table
    alone: dict[str, Measured]  # by client


def compare(
    lm: LanguageModel,
    held_out: HeldOut,
    config: RunConfig,
    adapter: StateDict,
    alone: Mapping[str, StateDict],
    pooled: Mapping[str, StateDict],
    personal: Mapping[str, StateDict] | None = None,
    start: StateDict | None = None,
) -> Comparison:
    """Every method on the same held-out examples.

    Args:
        lm: the model.
        held_out: the examples.
        config: says whether answers are generated, and whether the untuned base has a row.
        adapter: the federated one.
        alone: each client's own, trained alone; without any, there is no row for it.
        pooled: those trained on all data, by method, in the order of the table.
        personal: each client's own federated one, where each has one (`adapter.share` = "a"); the federated row is
            then their mean, as the local row is of those trained alone.
        start: what the federation began from, where that is no new adapter, which is the base.
    """

    def score(state: StateDict) -> Measured:
        return measure(lm, state, held_out, config)

    scores = {name: score(state) for name, state in alone.items()}
    rows: dict[str, Measured] = {}
    if "base" in config.evaluate.baselines:
        rows["base"] = score(fresh_adapter(lm, config.seed))
    if start is not None:
        rows["start"] = score(start)
    if scores:
        rows["local"] = mean(list(scores.values()))
    rows["federated"] = mean([score(state) for state in personal.values()]) if personal else score(adapter)
    rows |= {method: score(state) for method, state in pooled.items()}
    return Comparison(rows, scores)


def exact_match(given: str, reference: str) -> bool:
    """Whether the answers are the same up to white space at the ends and its runs inside."""
    return " ".join(given.split()) == " ".join(reference.split())


def mean(runs: Sequence[Measured]) -> Measured:
    """The average over several adapters, example by example (the `local` row: one adapter a client)."""
    correct = [run.correct for run in runs if run.correct is not None]
    return Measured(
        np.mean([run.nats for run in runs], axis=0),
        runs[0].tokens,
        np.mean(correct, axis=0) if len(correct) == len(runs) else None,
    )


def table_row(method: str, run: Measured, seed: int) -> dict[str, Any]:
    """A row of the table in the form of metrics.json; its intervals are over the examples alone."""
    return {
        "method": method,
        "loss": run.loss,
        "accuracy": run.accuracy,
        "n": len(run.nats),
        "ci95": {
            "loss": _ends(intervals.over_rows(run.nats, run.tokens, seed=seed)),
            "accuracy": None if run.hits is None else _ends(intervals.of_share(run.hits)),
            "over": "rows",
        },
    }


def differences(runs: Mapping[str, Measured], seed: int, method: str = "federated") -> dict[str, dict[str, Any]]:
    """How far the loss of a method lies from each other one's, example by example: the `paired` part of metrics.json.

    Whole examples are drawn, each with both of its losses, so that what makes one hard for both models cancels out
    (pairing as in Koehn 2004; the interval is `intervals.over_rows`). Two intervals that overlap may well hide a
    difference that this one shows. It is over the examples alone: two models whose training differed in nothing but the
    order of batches may differ too.

    Args:
        runs: every method on the same held-out examples.
        seed: of the resampling.
        method: the one that is compared.

    Returns:
        By other method `difference` (nats per response token, below 0 where `method` is better), its 95% interval
        `ci95` (None for fewer than `intervals.FEWEST_ROWS` examples, or a loss that is not a number), `n`, and `of`,
        what the interval is of.
    """
    ours = runs[method]
    return {
        name: {
            "difference": ours.loss - run.loss,
            "ci95": _ends(intervals.over_rows(ours.nats - run.nats, ours.tokens, seed=seed)),
            "n": len(run.nats),
            "of": intervals.SCOPE,
        }
        for name, run in runs.items()
        if name != method
    }


def _ends(found: intervals.Ends | None) -> list[float] | None:
    return None if found is None else list(found)


def by_kind(
    kind: Callable[[Example], str], runs: Mapping[str, Measured], held_out: HeldOut
) -> dict[str, dict[str, float]]:
    """Accuracy per kind of example (a skill, a category) and method; empty where answers were not generated.

    Examples that ask nothing do not count.
    """
    found: dict[str, dict[str, float]] = {}
    labels = np.array([kind(example) for example in held_out.examples])
    for value in sorted(set(labels.tolist())):
        of_kind = {m: run.correct[labels == value] for m, run in runs.items() if run.correct is not None}
        asked = {m: correct[~np.isnan(correct)] for m, correct in of_kind.items()}
        if not of_kind or any(map(len, asked.values())):
            found[str(value)] = {m: float(correct.mean()) for m, correct in asked.items()}
    return found
