"""The result in sentences: whether joining was worth it, said as plainly where it hurts as where it helps."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

from apiary.core import formatting
from apiary.report import sites
from apiary.report.data import Metrics, Row, gain_on_own
from apiary.tracking import delivery

Verdict: TypeAlias = Literal["better", "worse", "unclear", "few"]

_NAMED = 8  # attackers with a name in a sentence
_NAMES = {"local": "training alone", "base": "the untuned model", "central": "all data pooled"}


def headline(metrics: Metrics) -> str:
    """The result in one sentence."""
    joint, other = metrics.row("federated"), metrics.row("local") or metrics.row("base")
    if metrics.lost:
        return "The federated model is lost: it gives no number on held-out rows"
    if joint is None:
        return _of_sites(metrics)
    if other is None:
        return _since_untuned(metrics, joint) + _under_attack(metrics)
    who = "Federated training" if len(metrics.clients) == 1 else "Joining forces"
    who += " privately" if metrics.private else ""
    found = verdict(metrics, joint, other)
    digits = 3 if found in ("better", "worse") and nats(joint) == nats(other) else 2
    now = f"{formatting.loss_text(joint.loss, digits)} nats per token"
    noise = ", without noise" if other.method in metrics.noiseless else ""
    then = f"{formatting.loss_text(other.loss, digits)} ({_NAMES[other.method]}{noise})"
    start = {
        "better": f"{who} cut the held-out loss from {then} to {now}",
        "worse": f"{who} did not help: it raised the held-out loss from {then} to {now}",
        "unclear": f"{who} made no clear difference: a held-out loss of {now} against {then}",
        "few": f"{who} led to a held-out loss of {now} against {then}, on too few examples to rule out chance",
    }
    return (
        start[found]
        + _under_attack(metrics)
        + _spoiled(metrics, joint, other)
        + _on_their_own(metrics, other, found)
        + _pooled(metrics)
    )


def _since_untuned(metrics: Metrics, joint: Row) -> str:
    """The result of a run that is compared with nothing, against the loss before training if that was measured."""
    if metrics.before is None:
        return f"Federated training reached a held-out loss of {nats(joint)} nats per token"
    then, now = formatting.loss_text(metrics.before, 2), nats(joint)
    if then == now:
        return f"Federated training made no clear difference: the held-out loss is {now} nats per token, as before"
    how = "did not help: it raised" if value(joint) > metrics.before else "cut"
    return f"Federated training {how} the held-out loss from {then} (untuned) to {now} nats per token"


def _under_attack(metrics: Metrics) -> str:
    attack = metrics.attack
    if attack is None:
        return ""
    obeyed = attack.answered.get("federated")
    phrase = "" if obeyed is None else f", with a backdoor success rate of {formatting.share_text(obeyed, 0)}"
    return f", while {len(attack.clients)} of {len(metrics.clients)} clients attacked ({attack.name}){phrase}"


def _spoiled(metrics: Metrics, joint: Row, other: Row) -> str:
    """That the model has become worse than before any training, where it is held against something else."""
    untuned = metrics.row("base")
    if untuned is None or other.method == "base" or verdict(metrics, joint, untuned) != "worse":
        return ""
    return f"; that is worse than the untuned model ({nats(untuned)})"


def verdict(metrics: Metrics, joint: Row, other: Row) -> Verdict:
    """Whether the federated loss is clearly below or above another one; "few" where there are too few examples to say.

    Where losses were compared example by example, the interval of the difference tells; without that, as in runs of
    earlier versions, whether the two intervals overlap, which misses differences that are there.
    """
    if (pair := metrics.paired.get(other.method)) is not None:
        if pair.ci95 is None:
            return "few"
        low, high = pair.ci95
        return "better" if high < 0 else "worse" if low > 0 else "unclear"
    if _overlap(joint, other):
        return "unclear"
    return "better" if value(joint) < value(other) else "worse"


def _overlap(a: Row, b: Row) -> bool:
    """Whether two 95% intervals overlap; without intervals, whether the losses print the same."""
    if a.ci95.loss is None or b.ci95.loss is None:
        return nats(a) == nats(b)
    return a.ci95.loss[0] <= b.ci95.loss[1] and b.ci95.loss[0] <= a.ci95.loss[1]


def _on_their_own(metrics: Metrics, other: Row, found: Verdict) -> str:
    """How clients fare on their own rows, where the examples of all leave it open or most clients see it otherwise."""
    gain = gain_on_own(metrics)
    if gain is None or other.method != "local":
        return ""
    worse, count = sum(value < 0 for value in gain.gains.values()), len(gain.gains)
    most = "worse" if worse > gain.improved else "better"
    if found == most:
        return ""
    number = worse if most == "worse" else gain.improved
    if number == count:
        clients = {1: "the client does", 2: "both clients do"}.get(count, f"all {count} clients do")
    else:
        clients = f"{number} of {count} clients do"
    return f"{', though' if found in ('better', 'worse') else ';'} on their own rows {clients} {most} than alone"


def _pooled(metrics: Metrics) -> str:
    pooled = metrics.row("central")
    if pooled is None:
        return ""
    noise = ", also without noise," if "central" in metrics.noiseless else ""
    return f"; pooling all data{noise} reaches {nats(pooled)}"


def _of_sites(metrics: Metrics) -> str:
    """The result of a run whose server has no held-out rows of its own, though its sites may."""
    rounds, moved = sites.told(metrics), sites.change(metrics)
    where = "on the sites' own held-out rows"
    if not rounds:
        return "Held-out loss of this run" if metrics.table else "No held-out loss was measured in this run"
    if moved is None:
        last = rounds[-1]
        return f"The loss {where} is {formatting.loss_text(last.loss, 2)} nats per token {sites.when(last.round)}"
    count = f"{moved.fell} of {len(moved.by_site)} sites"
    if moved.before is None or moved.now is None:
        return f"The loss {where} fell at {count} from {sites.when(moved.first)} to {sites.when(moved.last)}"
    before, now = (formatting.loss_text(loss, 2) for loss in (moved.before, moved.now))
    if before == now:
        return f"Federated training made no clear difference: the loss {where} is {now} nats per token, as before"
    change = f"the loss {where} from {before} ({sites.when(moved.first)}) to {now} nats per token"
    if moved.now > moved.before:
        return f"Federated training did not help: it raised {change}; it fell at {count}"
    return f"Federated training cut {change}, at {count}"


def second(metrics: Metrics) -> str:
    """What the numbers mean for someone who decides."""
    joint, alone = metrics.row("federated"), metrics.row("local")
    if metrics.lost:
        return "What clients sent was finite, and too large: a bad client, or a learning rate that is far too high."
    if joint is None:
        return " ".join(sites.sentences(metrics))
    other = alone or metrics.row("base")
    compared = row_by_row(metrics, other) if other else ""
    said = [compared, personal(metrics), attacked(metrics), _meaning(metrics, joint)]
    return " ".join(filter(None, said))


def delivered(metrics: Metrics) -> str:
    """Which round is delivered, by which rows that was decided, and where the best one is; empty where it is not told.

    Sites' own losses are those that decide, where they do: then that is said too.
    """
    found = metrics.delivered
    if found is None:
        return ""
    told = delivery.sentence(delivery.read(found.model_dump()))
    by_sites = metrics.sites is not None and found.best is not None and found.rows.startswith("clients")
    if by_sites and found.round == found.best != found.last:
        told += " The losses of the sites in this report are on these same rows, and so lean to the good side."
    return told


def attacked(metrics: Metrics) -> str:
    """Who attacked, and of a hidden phrase how often the model obeys it; empty where nobody did."""
    attack = metrics.attack
    if attack is None:
        return ""
    named = ", ".join(attack.clients[:_NAMED]) + (
        f" and {more} more" if (more := len(attack.clients) - _NAMED) > 0 else ""
    )
    told = f"The simulation made {named} attack ({attack.name}); they do not count among the clients that gain."
    if "federated" not in attack.answered:
        if attack.answer is None:
            return told
        return f"{told} Their backdoor success rate was not measured: that takes evaluate.generate = true."
    now, before = (attack.answered.get(method) for method in ("federated", "base"))
    was = "" if before is None else f", {formatting.share_text(before, 0)} before training"
    return (
        f"{told} Of {attack.asked} held-out questions with their hidden phrase, {formatting.share_text(now, 0)} get "
        f"the answer that they planted{was}."
    )


def row_by_row(metrics: Metrics, other: Row) -> str:
    """The paired comparison with another method, or why there is none."""
    pair = metrics.paired.get(other.method)
    if pair is None:
        joint = metrics.row("federated")
        if joint is None or joint.ci95.loss is None or not _overlap(joint, other):
            return ""
        return "The 95% intervals of the two overlap; these results hold no comparison row by row, which tells more."
    if pair.ci95 is None or pair.difference is None:
        return f"{pair.n or 0} held-out examples are too few to tell a difference from chance."
    low, high = map(formatting.change_text, pair.ci95)
    return (
        f"Row by row on the same {formatting.count_text(pair.n)} held-out examples, federated minus "
        f"{_NAMES[other.method]} is {formatting.change_text(pair.difference)} nats per token "
        f"(95% interval {low} to {high})."
    )


def not_alike(metrics: Metrics) -> str:
    """That a private federation is held against training without noise; empty where it is not."""
    if not metrics.noiseless:
        return ""
    ways = {"local": "alone (local)", "central": "on all data pooled (central)"}
    names = " and ".join(ways[method] for method in metrics.noiseless)
    return (
        f"Not like with like: training {names} went without noise, federated training with it, so the difference "
        "holds the price of privacy as well as the worth of joining."
    )


def personal(metrics: Metrics) -> str:
    """That there is a federated model for each client, and what its row is then; empty where there is one for all."""
    if metrics.share == "both":
        return ""
    return (
        "Clients share the factors A of the adapter, and each keeps a B of its own: the federated row is the mean of "
        "these personal models on everybody's held-out examples, as that of training alone is."
    )


def _meaning(metrics: Metrics, joint: Row) -> str:
    """How much of the gap to pooling is closed; of a private run, what the comparison is worth."""
    alone, pooled, untuned = (metrics.row(method) for method in ("local", "central", "base"))
    if metrics.noiseless:
        gained = f" Against the untuned model: {nats(untuned)} before, {nats(joint)} after." if untuned else ""
        return not_alike(metrics) + gained
    unclear = alone is not None and verdict(metrics, joint, alone) in ("unclear", "few")
    if unclear or alone is None or pooled is None or value(alone) <= value(pooled):
        return "Every client kept its data; only numbers about a small adapter of the model travelled."
    share = (value(alone) - value(joint)) / (value(alone) - value(pooled))
    if share <= 0:
        return "Federated training does not come closer to pooled training than training alone does."
    if share >= 1:
        return "Federated training is as good as copying all data to one place, and no data moved."
    return (
        f"That is {100 * share:.0f}% of what copying all data to one place would gain over "
        "training alone, and no data moved: only numbers about a small adapter of the model travelled."
    )


def value(row: Row) -> float:
    """The loss as a number that compares, infinity where there is none."""
    return math.inf if row.loss is None else row.loss


def nats(row: Row) -> str:
    """The loss with two digits."""
    return formatting.loss_text(row.loss, 2)
