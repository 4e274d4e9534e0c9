"""What is measured after which round, what is said of it, and when a run stops."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import overrides_for

from apiary.config import loading
from apiary.core.messages import Score
from apiary.data import examples, tokenization
from apiary.evaluation import comparison
from apiary.models import adapters
from server import client_scores, evaluation
from server.client_scores import Best
from server.evaluation import Evaluation


@pytest.mark.parametrize(
    ("every", "rounds", "due"), [(0, 4, []), (1, 3, [0, 1, 2, 3]), (2, 5, [0, 2, 4, 5]), (3, 3, [0, 3]), (9, 4, [0, 4])]
)
def test_the_start_each_so_many_rounds_and_the_end_are_measured(every: int, rounds: int, due: list[int]) -> None:
    run = loading.load(None, [f"evaluate.every={every}", f"rounds={rounds}"])
    assert [number for number in range(rounds + 1) if evaluation.is_due(number, run)] == due


@pytest.mark.parametrize(
    ("stages", "rounds", "finished"),
    [
        (1, 2, {0: 0, 2: 1}),
        (2, 6, {0: 0, 3: 1, 6: 2}),
        (2, 5, {0: 0, 3: 1, 5: 2}),
        (3, 4, {0: 0, 2: 1, 3: 2, 4: 3}),
    ],
)
def test_stages_are_measured_before_the_first_round_and_at_their_ends(
    stages: int, rounds: int, finished: dict[int, int]
) -> None:
    names = ", ".join(f'["s{i}"]' for i in range(stages))
    run = loading.load(None, [f"continual.stages=[{names}]", f"rounds={rounds}"])
    found = {number: evaluation.finished_stages(number, run) for number in range(rounds + 1)}
    assert {number: count for number, count in found.items() if count is not None} == finished


def test_a_run_without_stages_measures_none() -> None:
    run = loading.load(None, ["rounds=3"])
    assert [evaluation.finished_stages(number, run) for number in range(4)] == [None] * 4


OWN = Evaluation(Score(20.0, 10, 4), (1.5, 2.5))
PANEL = {"c0": [3.0, 2, 1], "c1": [0.0, 0, 0], "c2": [4.0, 8, 2]}


def test_a_run_stops_by_the_panel_and_only_without_one_by_the_table() -> None:
    """Stopping early on the examples of the final table would flatter it."""
    scores, fields = evaluation.combine(OWN, None)
    assert (scores, fields) == ({"": OWN.score}, {"loss": 2.0, "ci95": [1.5, 2.5], "n": 4})
    scores, fields = evaluation.combine(OWN, PANEL)
    assert scores == {"c0": Score(3.0, 2, 1), "c2": Score(4.0, 8, 2)}
    assert fields == {
        "loss": 2.0,
        "ci95": [1.5, 2.5],
        "n": 4,
        "clients": {"c0": 1.5, "c2": 0.5},
        "clients_loss": 0.75,  # of the eight tokens six count, three times the two
        "clients_rows": {"c0": [1, 2], "c2": [2, 8]},
        "clients_few": ["c1"],
    }
    assert evaluation.combine(None, None) == ({}, {})
    scores, fields = evaluation.combine(OWN, {})  # all were asked and nobody answered: nothing to compare
    assert scores == {} and fields["clients"] == {} and math.isnan(fields["clients_loss"])


@pytest.mark.parametrize("claims", [6000, 10**6, 2**53])
@pytest.mark.parametrize("honest", [1, 2, 5])
def test_no_client_makes_the_loss_of_all_by_the_tokens_it_claims(claims: int, honest: int) -> None:
    """Held against numpy's mean with the weights written out."""
    tokens = [1000, 1200, 900, 1000, 1100][:honest]
    panel = {f"c{i}": [2.0 * count, count, 10] for i, count in enumerate(tokens)}
    fair = evaluation.combine(None, panel)[1]["clients_loss"]
    assert fair == pytest.approx(2.0)
    panel["liar"] = [9.0 * claims, claims, 10]
    fields = evaluation.combine(None, panel)[1]
    most = 3 * (1000 if honest != 2 else 1200)
    assert fields["clients_loss"] == pytest.approx(np.average([2.0] * honest + [9.0], weights=[*tokens, most]))
    assert fields["clients"]["liar"] == 9.0 and fields["clients_rows"]["liar"] == [10, claims]


def test_the_best_evaluation_is_that_with_the_lowest_median_among_common_clients() -> None:
    best = Best({}, 0)
    losses = [(5.0, 5.0, 5.0), (4.0, 4.0, 9.0), (4.0, 4.5, 1.0), (3.9, 3.9, 8.0)]
    counts = []
    for losses_of_round in losses:
        scores = {f"c{i}": Score(loss * 10, 10, 2) for i, loss in enumerate(losses_of_round)}
        best = client_scores.update_best(best, scores)
        counts.append(best.without_gain)
    assert counts == [0, 0, 1, 0]  # in the third the median client has 4.0 again
    joined = client_scores.update_best(best, {"c9": Score(1.0, 10, 2)})  # nobody in common: it is the best so far
    assert joined.without_gain == 0 and set(joined.scores) == {"c9"}
    assert client_scores.update_best(best, {}).without_gain == 1


def test_small_gains_of_most_clients_do_not_add_up_to_a_loss() -> None:
    """Round by round two of three gain a little and the third loses much: the first is still the best."""
    best = Best({}, 0)
    for losses in [(1.0, 1.0, 1.0), (0.99, 0.99, 5.0), (5.0, 0.98, 4.99), (5.1, 0.97, 4.98)]:
        best = client_scores.update_best(best, {f"c{i}": Score(loss * 10, 10, 2) for i, loss in enumerate(losses)})
    assert [best.scores[f"c{i}"][0] for i in range(3)] == pytest.approx([9.9, 9.9, 50.0])
    assert best.without_gain == 2


@pytest.mark.parametrize(
    ("patience", "without_gain", "stops"), [(0, 99, False), (3, 2, False), (3, 3, True), (3, 4, True)]
)
def test_patience_is_counted_in_evaluations(patience: int, without_gain: int, stops: bool) -> None:
    run = loading.load(None, [f"evaluate.patience={patience}"])
    reason = evaluation.stop_reason(without_gain, run)
    wanted = f"no better loss in {without_gain} evaluations (evaluate.patience = {patience})"
    assert reason == (wanted if stops else "")


def test_the_adapter_is_measured_on_the_servers_rows(tiny_model: Path, rows_file: Path) -> None:
    """Against the model's own logits, row by row, without batches."""
    run = loading.load(None, overrides_for(tiny_model, rows_file))
    lm = adapters.load(run.model, run.adapter)
    template = tokenization.make_template(run.prompt, lm.tokenizer)
    run = run.model_copy(update={"evaluate": run.evaluate.model_copy(update={"max_examples": 60})})
    held_out = comparison.prepare(examples.read(str(rows_file)).examples[:60], template, lm, run)
    rng = torch.Generator().manual_seed(1)
    adapter = {n: torch.randn(t.shape, generator=rng) * 0.05 for n, t in adapters.fresh_adapter(lm, 0).items()}
    found = evaluation.on_held_out(lm, held_out, seed=3)(adapter)

    adapters.set_adapter(lm, adapter)
    corpus, nats, tokens = held_out.corpus, 0.0, 0
    with torch.inference_mode():
        for first, end in itertools.pairwise(corpus.offsets.tolist()):
            ids, trained = torch.tensor(corpus.ids[first:end]).long(), torch.tensor(corpus.trained[first + 1 : end])
            logits = lm.model(input_ids=ids[None]).logits[0, :-1].double()
            lost = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            nats, tokens = nats + float(lost[trained].sum()), tokens + int(trained.sum())
    assert (found.score.tokens, found.score.examples) == (tokens, 60)
    assert found.score.nats == pytest.approx(nats, rel=1e-5)
    assert found.interval is not None and found.interval[0] <= found.score.loss <= found.interval[1]


def test_of_few_rows_the_server_tells_no_interval() -> None:
    _, fields = evaluation.combine(OWN._replace(interval=None), None)
    assert fields == {"loss": 2.0, "ci95": None, "n": 4}
