"""The result in sentences: whether joining was worth it, said as plainly where it hurts as where it helps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

from apiary.core import formatting
from apiary.evaluation import intervals
from apiary.report import sites
from apiary.report.data import Gain, MethodName, Metrics, Outcome, OwnName, Row, gain_of, gain_on_own
from apiary.tracking import delivery

Verdict: TypeAlias = Literal["better", "worse", "unclear", "few"]

_NAMED = 8  # attackers with a name in a sentence
_OUTCOMES_BY = "by a 95% interval over these rows, of these two models"
_NAMES = {
    "local": "training alone",
    "base": "the untuned model",
    "start": "the start",
    "central": "all data pooled",
    "central_serial": "all data pooled in serial steps",
}


def headline(metrics: Metrics) -> str:
    """The result in one sentence."""
    joint, other = metrics.row("federated"), against(metrics)
    if metrics.lost:
        return "The federated model is lost: it gives no number on held-out rows"
    if joint is None:
        return _of_sites(metrics)
    if not metrics.joined:
        return _by_itself(metrics, joint) + _under_attack(metrics)
    if other is None:
        return _since_untuned(metrics, joint) + _under_attack(metrics)
    who = "Joining forces privately" if metrics.private else "Joining forces"
    found = verdict(metrics, joint, other)
    digits = 3 if found in ("better", "worse") and nats(joint) == nats(other) else 2
    now = f"{formatting.loss_text(joint.loss, digits)} nats per token"
    then = f"{formatting.loss_text(other.loss, digits)} ({_NAMES[other.method]}{caveat(metrics, other.method)})"
    scope = f", {intervals.SCOPE}" if _is_by_rows(metrics, joint, other) else ""
    start = {
        "better": f"{who} cut the held-out loss from {then} to {now}{scope}",
        "worse": f"{who} did not help: it raised the held-out loss from {then} to {now}{scope}",
        "unclear": f"{who} made no clear difference: a held-out loss of {now} against {then}{scope}",
        "few": f"{who} led to a held-out loss of {now} against {then}, on too few examples to rule out chance",
    }
    return (
        start[found]
        + _under_attack(metrics)
        + _spoiled(metrics, joint, other)
        + _on_their_own(metrics, other, found)
        + _pooled(metrics)
    )


def against(metrics: Metrics) -> Row | None:
    """The row that the result is held against: training alone; where nobody joined, the start, or the untuned model."""
    return (metrics.row("local") if metrics.joined else None) or metrics.row("start") or metrics.row("base")


def caveat(metrics: Metrics, method: MethodName) -> str:
    """What a sentence adds to a baseline that is no fair comparison; empty for others."""
    return ", without noise" if method in metrics.noiseless else ", not alike" if method in metrics.unlike else ""


def _before(metrics: Metrics) -> str:
    """What the loss before the first round is of."""
    return "untuned" if metrics.row("start") is None else "the start"


def _by_itself(metrics: Metrics, joint: Row) -> str:
    """The result of a run in which a single client took part."""
    first = metrics.row("start") or metrics.row("base")
    before = metrics.before if first is None else first.loss
    start = "" if before is None else f"from {formatting.loss_text(before, 2)} ({_before(metrics)}) "
    loss = f"{start}to a held-out loss of {nats(joint)} nats per token"
    return f"Nothing was federated: one client trained by itself, {loss}"


def nobody_joined(metrics: Metrics) -> str:
    """That nothing is said of joining, for a single client took part; empty where there were several."""
    if metrics.joined or metrics.row("federated") is None:
        return ""
    return (
        "A single client took part, so there was nobody to join: every row of the table is of its data alone, and what "
        "they differ in is how the steps were made."
    )


def _since_untuned(metrics: Metrics, joint: Row) -> str:
    """The result of a run that is compared with nothing, against the loss before training if that was measured."""
    if metrics.before is None:
        return f"Federated training reached a held-out loss of {nats(joint)} nats per token"
    then, now = formatting.loss_text(metrics.before, 2), nats(joint)
    if then == now:
        return f"Federated training made no clear difference: the held-out loss is {now} nats per token, as before"
    how = "did not help: it raised" if value(joint) > metrics.before else "cut"
    return f"Federated training {how} the held-out loss from {then} ({_before(metrics)}) to {now} nats per token"


def _under_attack(metrics: Metrics) -> str:
    attack = metrics.attack
    if attack is None:
        return ""
    obeyed = attack.answered.get("federated")
    phrase = "" if obeyed is None else f", with a backdoor success rate of {formatting.share_text(obeyed, 0)}"
    return f", while {len(attack.clients)} of {len(metrics.clients)} clients attacked ({attack.name}){phrase}"


def _spoiled(metrics: Metrics, joint: Row, other: Row) -> str:
    """That the model has become worse than before this training or any, where it is held against something else."""
    start, untuned = metrics.row("start"), metrics.row("base")
    if start is not None and verdict(metrics, joint, start) == "worse":
        return f"; that is worse than the start ({nats(start)})"
    if untuned is None or other.method in ("base", "start") or verdict(metrics, joint, untuned) != "worse":
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


def _is_by_rows(metrics: Metrics, joint: Row, other: Row) -> bool:
    """Whether an interval over rows decides the verdict, so that it holds of these two models on these rows alone."""
    return other.method in metrics.paired or (joint.ci95.loss is not None and other.ci95.loss is not None)


def _overlap(a: Row, b: Row) -> bool:
    """Whether two 95% intervals overlap; without intervals, whether the losses print the same."""
    if a.ci95.loss is None or b.ci95.loss is None:
        return nats(a) == nats(b)
    return a.ci95.loss[0] <= b.ci95.loss[1] and b.ci95.loss[0] <= a.ci95.loss[1]


def _on_their_own(metrics: Metrics, other: Row, found: Verdict) -> str:
    """How clients fare on their own rows, unless all of them see it as the examples of all do.

    Where clients made models of their own, each way of training is asked at its best.
    """
    if metrics.personal is not None and (means := _own_means(metrics)) is not None:
        alone, joint, own = (formatting.loss_text(loss, 3) for loss in means)
        return f"; on their own rows training alone at its best has {alone}, the shared model {joint}, own models {own}"
    gain = gain_on_own(metrics)
    if gain is None or other.method != "local":
        return ""
    agree: Outcome | None = "gain" if found == "better" else "lose" if found == "worse" else None
    if agree and gain.count(agree) == len(gain.gains):
        return ""
    return f"; on their own rows {outcomes_text(gain)}"


def _own_means(metrics: Metrics) -> tuple[float, float, float] | None:
    """Mean losses on clients' own rows, alone at its best, federated and by own models; None where one is not told."""
    names: tuple[OwnName, ...] = ("local_best", "federated", "personal")
    means = {row.method: row.own for row in metrics.personal.table} if metrics.personal else {}
    found = [loss for name in names if (loss := means.get(name)) is not None]
    return (found[0], found[1], found[2]) if len(found) == len(names) else None


def shared_at_best(metrics: Metrics) -> str:
    """Whether the shared model as it is beats training alone at its best on clients' own rows; "" if not measured."""
    clients = [client for client in metrics.honest if client.personal is not None]
    gain = gain_of(
        (c.client, c.personal.own.get("local_best"), c.personal.own.get("federated"), None)
        for c in clients
        if c.personal is not None
    )
    if gain is None or not metrics.joined:
        return ""
    better = sum(change > 0 for change in gain.gains.values())
    count = f"it is lower for {better} of {formatting.plural(len(gain.gains), 'client')}"
    change, ends = formatting.change_text(-gain.mean), gain.mean_ends
    if ends is None:
        return (
            f"On own rows the shared model as it is and training alone at its best differ by {change} nats per token."
        )
    low, high = -ends[1], -ends[0]
    found = "better than" if high < 0 else "worse than" if low > 0 else "neither clearly better nor clearly worse than"
    return (
        f"On own rows the shared model as it is, is {found} training alone at its best: {change} nats per token on "
        f"average (95% interval over clients {formatting.change_text(low)} to {formatting.change_text(high)}), and "
        f"{count}."
    )


def outcomes_text(gain: Gain) -> str:
    """How many clients gain, lose, and cannot tell: `2 of 5 clients gain, 1 loses, 2 cannot tell`."""
    gaining, losing, others = (gain.count(outcome) for outcome in ("gain", "lose", "cannot tell"))
    gains = "gains" if gaining == 1 else "gain"
    return (
        f"{gaining} of {formatting.plural(len(gain.gains), 'client')} {gains}, {losing} "
        f"{'loses' if losing == 1 else 'lose'}, {others} cannot tell"
    )


def rows_text(gain: Gain) -> str:
    """How many rows of its own a client's outcome rests on, such as `25 to 150 rows each`; empty if it is not told."""
    if gain.rows is None:
        return ""
    fewest, most = gain.rows
    count = f"{fewest:,} to {most:,} rows" if fewest != most else formatting.plural(most, "row")
    return f"{count} each" if len(gain.gains) > 1 else count


def gained(metrics: Metrics) -> str:
    """How clients fare on their own held-out rows, with what that rests on; empty where it was not measured."""
    gain = gain_on_own(metrics)
    if gain is None:
        return ""
    but = caveat(metrics, "local")
    rows = f" ({rows_text(gain)})" if gain.rows else ""
    return f"On their own held-out rows{rows}, {outcomes_text(gain)}, against training alone{but}: {_OUTCOMES_BY}."


def _pooled(metrics: Metrics) -> str:
    pooled = metrics.row("central")
    if pooled is None:
        return ""
    unlike = " (not alike)" if "central" in metrics.unlike else ""
    also = ", also without noise," if "central" in metrics.noiseless else unlike
    serial = metrics.row("central_serial")
    more = f", or {nats(serial)} in as few steps as one client makes" if serial else ""
    return f"; pooling all data{also} reaches {nats(pooled)}{more}"


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
    who = "Federated training" if metrics.joined else "Training at one site, with nobody to join,"
    if before == now:
        return f"{who} made no clear difference: the loss {where} is {now} nats per token, as before"
    change = f"the loss {where} from {before} ({sites.when(moved.first)}) to {now} nats per token"
    if moved.now > moved.before:
        return f"{who} did not help: it raised {change}; it fell at {count}"
    return f"{who} cut {change}, at {count}"


def second(metrics: Metrics) -> str:
    """What the numbers mean for someone who decides."""
    joint = metrics.row("federated")
    if metrics.lost:
        return "What clients sent was finite, and too large: a bad client, or a learning rate that is far too high."
    if joint is None:
        return " ".join(sites.sentences(metrics))
    other = against(metrics)
    compared = row_by_row(metrics, other) if other else ""
    said = [
        compared,
        personal(metrics),
        attacked(metrics),
        nobody_joined(metrics) or _meaning(metrics, joint),
        shared_at_best(metrics),
    ]
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
        return f"{pair.n or 0} held-out examples are too few to tell a difference from chance: no interval is given."
    low, high = map(formatting.change_text, pair.ci95)
    return (
        f"Row by row on the same {formatting.count_text(pair.n)} held-out examples, federated minus "
        f"{_NAMES[other.method]} is {formatting.change_text(pair.difference)} nats per token "
        f"(95% interval {low} to {high}), {intervals.SCOPE}."
    )


def not_alike(metrics: Metrics) -> str:
    """Why baselines are no fair comparison, such as training without noise; empty where they are."""
    said = []
    if metrics.noiseless:
        said.append(
            f"Not like with like: training {_ways(metrics.noiseless)} went without noise, federated training with it, "
            "so the difference holds the price of privacy as well as the worth of joining."
        )
    by_reason: dict[str, list[MethodName]] = {}
    for method, reasons in metrics.unlike.items():
        for kind, reason in reasons.items():
            if kind != "noise":
                by_reason.setdefault(reason, []).append(method)
    said += [f"Not like with like: training {_ways(found)} {reason}." for reason, found in by_reason.items()]
    return " ".join(said)


def _ways(methods: Sequence[MethodName]) -> str:
    """Baselines as the ways of training that they are."""
    pooled = " and ".join(method for method in methods if method != "local")
    ways = (["alone (local)"] if "local" in methods else []) + ([f"on all data pooled ({pooled})"] if pooled else [])
    return " and ".join(ways)


def personal(metrics: Metrics) -> str:
    """That there is a federated model for each client, and what its row is then; empty where there is one for all."""
    before = "Clients share the factors A of the adapter, and each keeps a B of its own"  # in a run of earlier versions
    said = metrics.each_has or (before if metrics.share != "both" else "")
    return (
        f"{said}: the federated row is the mean of these personal models on everybody's held-out examples, as that of "
        "training alone is."
        if said
        else ""
    )


def _meaning(metrics: Metrics, joint: Row) -> str:
    """How much of the gap to pooling is closed; of a private run, what the comparison is worth."""
    alone, untuned = metrics.row("local"), metrics.row("base")
    pooled = metrics.row("central") or metrics.row("central_serial")
    if metrics.noiseless:
        gained = f" Against the untuned model: {nats(untuned)} before, {nats(joint)} after." if untuned else ""
        return not_alike(metrics) + gained
    if metrics.unlike:
        return not_alike(metrics) + " For that reason no share of the gap to pooled training is told."
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
        f"training alone{_serial_share(metrics, alone, joint)}, and no data moved: only numbers about a small adapter "
        "of the model travelled."
    )


def _serial_share(metrics: Metrics, alone: Row, joint: Row) -> str:
    """The share of what pooled training gains in the serial steps that a federation makes."""
    serial = metrics.row("central_serial")
    if serial is None or value(alone) <= value(serial):
        return ""
    if metrics.row("central") is None:
        return " in as few steps as one client makes"
    share = (value(alone) - value(joint)) / (value(alone) - value(serial))
    return f" ({100 * share:.0f}% of what it would gain in as few steps as one client makes)"


def value(row: Row) -> float:
    """The loss as a number that compares, infinity where there is none."""
    return math.inf if row.loss is None else row.loss


def nats(row: Row) -> str:
    """The loss with two digits."""
    return formatting.loss_text(row.loss, 2)
