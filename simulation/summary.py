"""What a finished run comes to: the baselines trained, everything measured, and the content of metrics.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from apiary.config.schema import RunConfig
from apiary.config.summary import public_name
from apiary.core.tensors import StateDict
from apiary.data import injection, tokenization
from apiary.data.examples import Example, answer
from apiary.data.federation import Federation
from apiary.data.tokenization import Template
from apiary.data.turns import said
from apiary.evaluation import comparison, continual, row_losses
from apiary.evaluation.comparison import HeldOut, Measured
from apiary.export.adapter_folder import WEIGHTS, exported_rank, save_adapter_folder
from apiary.export.personal import read_choice
from apiary.models import adapter_files, adapters, gates
from apiary.models.adapters import LanguageModel
from apiary.models.start import named_start
from apiary.privacy import statement
from apiary.report.data import OUTCOMES, gain_of
from apiary.tracking import delivery, environment, event_log, metrics_file
from apiary.tracking.event_log import Event, RunLog
from apiary.tracking.run_directory import result_folders
from client.personal.own_model import Home, OwnRows
from simulation import adversaries, backdoor, baselines, client_models, personal, visits
from simulation.baselines import Baselines
from simulation.personal import Figures
from simulation.visits import ClientVisits
from strategies.from_config import local_from_config, method_from_config

_ASKED = 60  # held-out questions with a hidden phrase


class Plan(NamedTuple):
    """Everything a run needs, loaded and checked before a folder is made."""

    config: RunConfig
    federation: Federation
    lm: LanguageModel
    template: Template
    held_out: HeldOut


def summarise(
    prepared: Plan, adapter: StateDict, folder: Path, log: RunLog, shared: Path | None = None
) -> dict[str, Any]:
    """The content of metrics.json for a finished federation; trains the baselines on the way.

    Args:
        prepared: the run.
        adapter: the federated one.
        folder: the run directory; baselines are kept in it.
        log: has told what each client did, and receives what happens here.
        shared: where several runs share the baselines that they have alike; None where they do not.
    """
    config, federation, lm, template, held_out = prepared
    events = event_log.read_events(folder)
    delivered = delivery.of_events(events)
    counted = _counted(events, config)
    took_part = visits.of_run(federation.clients, config, counted, folder)
    if set(config.evaluate.baselines) - {"base"}:
        log.event("phase", name="baselines")
    finished = sum(event["event"] == "round" for event in counted)
    trained = baselines.train_all(config, lm, template, took_part, finished, folder, log, shared)
    log.event("phase", name="evaluating")
    own, written = own_models(prepared, folder, {client.client for client in took_part})
    local, pooled = ({name: made.adapter for name, made in group.items()} for group in trained)
    runs, alone = comparison.compare(lm, held_out, config, adapter, local, pooled, own, named_start(lm, config))
    steps = {client.client: client.total for client in took_part}
    ranks = metrics_file.ranks(events)
    clients = _per_client(prepared, adapter, trained, runs["federated"], alone, own, ranks, steps)
    figures = None
    if config.personal.enabled:
        figures = _personal(prepared, models_of(prepared, adapter, written), took_part, local, folder, log)
        clients = with_personal(clients, figures, beside=True)
    nats = {method: run.nats for method, run in runs.items()}
    row_losses.write_row_losses(folder, held_out.examples, runs["federated"].tokens, nats)
    kind = kind_of(config, federation)
    unlike = baselines.unlike(config, took_part)
    return {
        "schema": 1,
        "run": folder.name,
        "task": _task(prepared),
        "table": _table(runs, _accounts(trained, counted), unlike, config.seed),
        "paired": comparison.differences(runs, config.seed),
        "clients": client_models.with_groups(clients, events),
        **_deciding(prepared, adapter, own),
        "gain": _gain(clients, unlike.get("local")),
        "skills": comparison.by_kind(kind, runs, held_out) if kind and config.evaluate.generate else {},
        "rounds": metrics_file.rounds_table(events),
        "samples": _samples(prepared, runs, kind, None if own else adapter),
        "delivered": delivered._asdict() if delivered else None,
        **continual.results(events, runs, held_out, config),
        **({"share": config.adapter.share, "each_has": local_from_config(config).personal} if own else {}),
        **({"personal": figures.whole} if figures else {}),
        "rank": exported_rank(adapter),
        **_attack(prepared, adapter, events),
        "curation": metrics_file.curation_counts(events),
        "privacy": statement.read(folder),
        **{key: value for key, value in environment.start_fields(config).items() if key in ("machine", "versions")},
    }


def _task(prepared: Plan) -> str:
    """The run in a few words: how many clients, whose rows, which base."""
    config = prepared.config
    names = map(public_name, (config.data.source, config.model.name))
    return ", ".join([f"{len(prepared.federation.clients)} clients", *names])


def _table(
    runs: Mapping[str, Measured],
    told: Mapping[str, Mapping[str, Any]],
    unlike: Mapping[str, Mapping[str, str]],
    seed: int,
) -> list[dict[str, Any]]:
    """A row for each method: its figures, what its training told, and why it is no fair comparison, if it is none."""
    return [
        {
            **comparison.table_row(method, run, seed),
            **told[method],
            **({"not_alike": dict(unlike[method])} if method in unlike else {}),
        }
        for method, run in runs.items()
    ]


def _deciding(prepared: Plan, adapter: StateDict, own: Mapping[str, StateDict]) -> dict[str, Any]:
    """The `deciding` part of metrics.json: the delivered model's loss on the rows that are in no figure.

    Of clients with models of their own it is the mean over these. Empty where the server has no such rows.
    """
    rows = prepared.held_out.deciding
    if rows is None:
        return {}
    states = list(own.values()) or [adapter]
    found = comparison.mean([comparison.measure(prepared.lm, state, rows, prepared.config) for state in states])
    return {"deciding": {"loss": found.loss, "n": len(rows.examples)}}


def _counted(events: Sequence[Event], config: RunConfig) -> list[Event]:
    """The events of what made the adapter that is delivered: baselines are trained as far as that and no farther."""
    delivered = delivery.of_events(events)
    upto = delivered.round if delivered else config.rounds
    return [event for event in events if event["event"] not in ("client", "round") or event["round"] <= upto]


def _attack(prepared: Plan, adapter: StateDict, events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The `attack` part of metrics.json: who came to attack, and of a hidden phrase how often the models obey it."""
    config, federation, lm, template, _ = prepared
    names = [client.name for client in federation.clients]
    came = {event["client"] for event in events if event["event"] in ("client", "refused")}
    if not (hostile := [name for name in adversaries.attackers(config, names) if name in came]):
        return {}
    told: dict[str, Any] = {"name": config.simulate.attack.name, "clients": hostile}
    hidden = adversaries.of_run(config, names).hidden
    if hidden is None:
        return {"attack": told}
    phrase, told["answer"] = hidden
    asked = (
        backdoor.questions(lm, template, config, federation.test, phrase, _ASKED) if config.evaluate.generate else []
    )
    if not asked:
        return {"attack": told}
    answered: dict[str, float] = {}
    for method, state in (("base", adapters.fresh_adapter(lm, config.seed)), ("federated", adapter)):
        adapters.set_adapter(lm, state)
        answered[method] = round(backdoor.obeyed(lm, config, asked, told["answer"]), 4)
    return {"attack": {**told, "asked": len(asked), "answered": answered}}


def _accounts(trained: Baselines, events: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int | None]]:
    """By method the optimizer steps, the training rows that they drew from, and the response tokens that they trained.

    Those of baselines are what their own fits told (of `local` the mean over clients); those of the federation what its
    clients told, None where one did not.
    """
    came = [event for event in events if event["event"] == "client"]
    names = {event["client"] for event in came}
    rows = {event["client"]: event["examples"] for event in events if event["event"] == "handshake"}
    rows |= {name: counts["kept"] for name, counts in metrics_file.curation_counts(events).items()}
    keys = ("steps", "rows", "tokens")
    found: dict[str, dict[str, int | None]] = {
        "base": dict.fromkeys(keys, 0),
        "start": dict.fromkeys(keys, 0),
        "federated": {
            "steps": _sum(event["steps"] for event in came),
            "rows": _sum(rows.get(name) for name in names),
            # A private visit tells the rows that are expected in its batches, which are no tokens.
            "tokens": None if any("spent" in event for event in came) else _sum(event["tokens"] for event in came),
        },
        **{method: {key: getattr(made.account, key) for key in keys} for method, made in trained.pooled.items()},
    }
    alone = [made.account for made in trained.alone.values()]
    if alone:
        found["local"] = {key: round(sum(getattr(account, key) for account in alone) / len(alone)) for key in keys}
    return found


def _sum(counts: Iterable[int | None]) -> int | None:
    """The sum; None where one is not told."""
    known = list(counts)
    return None if None in known else sum(count for count in known if count is not None)


class OwnModels(NamedTuple):
    """The clients' models of their own, by client; none where the method makes one for all."""

    used: dict[str, StateDict]  # as the clients use them, which is what is measured
    written: dict[str, StateDict]  # as an adapter folder holds them: without gates


def own_models(prepared: Plan, folder: Path, trained: Collection[str]) -> OwnModels:
    """Each client's model of its own, where the method makes one; that of who has trained is kept as a folder."""
    config, federation, lm, template, _ = prepared
    method = method_from_config(config)
    if not method.local.personal:
        return OwnModels({}, {})
    made = client_models.of_clients(lm, config, method, [client.name for client in federation.clients], folder)
    written, about = dict(made), ""
    if method.local.mixes:
        about = gates.FIXED
        for client in federation.clients:
            rows = injection.encode_training(gates.sample(client.train), template, lm.tokenizer, config.prompt)
            written[client.name] = gates.fixed(lm, made[client.name], rows)
    for client in federation.clients:
        if client.name in trained:
            place = result_folders(folder).personal / client.name
            if read_choice(place) is not None:  # [personal] has chosen already, and looks itself whether that holds
                continue
            save_adapter_folder(lm, written[client.name], place, config, folder, about=about)
    return OwnModels(made, written)


def models_of(prepared: Plan, adapter: StateDict, own: Mapping[str, StateDict]) -> dict[str, StateDict]:
    """Each client's model from the federation: one of its own where the method makes one, else the shared one."""
    return {client.name: own.get(client.name, adapter) for client in prepared.federation.clients}


def _personal(
    prepared: Plan,
    federated: Mapping[str, StateDict],
    took_part: Sequence[ClientVisits],
    local: Mapping[str, StateDict],
    folder: Path,
    log: RunLog,
) -> Figures:
    """Make the clients' own models by the rows that were set apart before round 1, and measure them."""
    config, federation, lm, template, held_out = prepared
    home = Home(config, lm, template)
    rows = personal.rows_of(federation, federation, config)
    return personal.make_and_measure(home, folder, federated, rows, took_part, local, held_out, log)


def personal_of_run(
    prepared: Plan, adapter: StateDict, rows: Mapping[str, OwnRows], folder: Path, log: RunLog
) -> Figures:
    """Make the clients' own models of a run that has finished, and measure them.

    Args:
        prepared: the run, with the held-out rows of its figures.
        adapter: the federated one.
        rows: the parts of each client's rows.
        folder: the run directory.
        log: receives what happens.
    """
    config, federation, lm, template, held_out = prepared
    counted = _counted(event_log.read_events(folder), config)
    took_part = visits.of_run(federation.clients, config, counted, folder)
    own = own_models(prepared, folder, {client.client for client in took_part}).written
    weights = {path.parent.name: path for path in result_folders(folder).alone.glob(f"[!.]*/{WEIGHTS}")}
    local = {client: adapter_files.read_adapter(lm, path) for client, path in weights.items()}
    home, federated = Home(config, lm, template), models_of(prepared, adapter, own)
    return personal.make_and_measure(home, folder, federated, rows, took_part, local, held_out, log)


def with_personal(clients: Sequence[Mapping[str, Any]], figures: Figures, *, beside: bool) -> list[dict[str, Any]]:
    """The `clients` part of metrics.json with what their own models come to.

    Args:
        clients: without it.
        figures: of those that have a model of their own.
        beside: whether these are on the rows that the losses of the others in `own` are on, and stand beside them.
    """
    told = []
    for client in clients:
        found = figures.clients.get(client["client"])
        if found is None:
            told.append(dict(client))
            continue
        ours = {name: found["own"][name] for name in ("local_best", "personal") if beside and name in found["own"]}
        told.append({**client, "own": {**client["own"], **ours}, "personal": found})
    return told


def _per_client(
    prepared: Plan,
    adapter: StateDict,
    trained: Baselines,
    joint: Measured,
    alone: Mapping[str, Measured],
    own_federated: Mapping[str, StateDict],
    ranks: Mapping[str, int],
    steps: Mapping[str, int],
) -> list[dict[str, Any]]:
    """What each client holds, what it and its baseline trained, and how it fares on its own rows and everybody's."""
    config, federation, lm, template, _ = prepared
    kind = kind_of(config, federation)
    fresh = adapters.fresh_adapter(lm, config.seed)
    loss_only = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"generate": False})})
    rows = []
    for client in federation.clients:
        own = comparison.prepare(client.test, template, lm, loss_only)
        made = trained.alone.get(client.name)
        candidates = {
            "base": fresh,
            **({"local": made.adapter} if made else {}),
            "federated": own_federated.get(client.name, adapter),
            **{method: pooled.adapter for method, pooled in trained.pooled.items()},
        }
        measured = {
            method: comparison.measure(lm, state, own, loss_only)
            for method, state in candidates.items()
            if own.examples
        }
        stats = tokenization.encode_all(client.train, template, lm.tokenizer, config.prompt).stats
        rows.append(
            {
                "client": client.name,
                "rank": ranks.get(client.name),
                "steps": steps.get(client.name, 0),
                "examples": stats.examples,
                "tokens": stats.response_tokens,
                "cut": stats.cut,
                "dropped": stats.dropped,
                "mix": dict(Counter(map(kind, client.train)).most_common()) if kind else {},
                "own": {method: run.loss for method, run in measured.items()},
                "own_paired": _against_alone(measured.get("federated"), measured.get("local"), config.seed),
                "mix_loss": {"local": alone[client.name].loss} if client.name in alone else {},
                "mix_paired": _against_alone(joint, alone.get(client.name), config.seed),
                **({"alone": made.account._asdict()} if made else {}),
            }
        )
    return rows


def _against_alone(joint: Measured | None, alone: Measured | None, seed: int) -> dict[str, dict[str, Any]]:
    """A client's federated loss minus that of its own training alone, row by row; empty where one is missing."""
    if joint is None or alone is None:
        return {}
    return comparison.differences({"federated": joint, "local": alone}, seed)


def _gain(clients: Sequence[Mapping[str, Any]], unlike: Mapping[str, str] | None) -> dict[str, Any]:
    """The `gain` part of metrics.json: by how many nats per token each client's own loss falls by joining.

    The losses are on the client's own held-out rows, against training alone. Empty where one client at most took part,
    and there was nobody to join.
    """
    if sum(client["steps"] > 0 for client in clients) < 2:
        return {}
    gain = gain_of(
        (c["client"], c["own"].get("local"), c["own"].get("federated"), c["own_paired"].get("local")) for c in clients
    )
    if gain is None:
        return {}
    worst, least = gain.worst
    return {
        "clients": len(gain.gains),
        **{outcome.replace(" ", "_"): gain.count(outcome) for outcome in OUTCOMES},
        "rows": gain.rows,
        "mean": gain.mean,
        "mean_ci95": gain.mean_ends,
        "over": "clients",
        "worst": {"client": worst, "gain": least},
        **({"not_alike": dict(unlike)} if unlike else {}),
    }


def kind_of(config: RunConfig, federation: Federation) -> Callable[[Example], str] | None:
    """What describes the data: the column it is partitioned by, which may be the answer, else a usual tag."""
    by = config.data.partition.options.get("by")
    if by and by == config.data.columns.get("output"):
        return answer
    carried = {name for client in federation.clients for example in client.train for name in example.tags}
    tag = next((tag for tag in (by, "skill", "category", "task", "label") if tag in carried), None)
    return None if tag is None else lambda example: example.tags.get(tag, "")


def _samples(
    prepared: Plan,
    runs: Mapping[str, Measured],
    kind: Callable[[Example], str] | None,
    adapter: StateDict | None,
) -> list[dict[str, str]]:
    """A few held-out prompts with every method's answer, spread over the kinds.

    Where answers were not measured (`evaluate.generate`), the untuned base and the federated model answer these alone.

    Args:
        prepared: the run.
        runs: what each method answered, if it did.
        kind: of an example; None where examples have none.
        adapter: the federated one; None where each client has its own.
    """
    config, held_out = prepared.config, prepared.held_out
    kinds = [kind(example) if kind else "" for example in held_out.examples]
    seen: Counter[str] = Counter()
    ranked = []  # the second of a kind comes after the first of every other
    for index, example in enumerate(held_out.examples):
        if held_out.questions[index] if held_out.questions else len(example.turns) > 1:
            ranked.append((seen[kinds[index]], index))
            seen[kinds[index]] += 1
    chosen = [index for _, index in sorted(ranked)[: config.evaluate.samples]]
    answered = {method: [run.texts[i] for i in chosen] for method, run in runs.items() if run.texts}
    if not config.evaluate.generate and chosen:
        lm, template = prepared.lm, prepared.template
        prompts = comparison.ask([held_out.examples[i] for i in chosen], template, lm, config)
        chosen = [i for i, ids in zip(chosen, prompts, strict=True) if ids]
        asked = [ids for ids in prompts if ids]
        for method, state in (("base", adapters.fresh_adapter(lm, config.seed)), ("federated", adapter)):
            if asked and state is not None and method in runs:
                adapters.set_adapter(lm, state)
                answered[method] = list(
                    comparison.answer_all(lm, asked, config.evaluate.max_new_tokens, template.thinking)
                )
    if not answered:
        return []
    return [
        {
            "prompt": "\n\n".join(said(turn) for turn in held_out.examples[i].turns[:-1] if turn.role != "system"),
            "reference": held_out.answers[i],
            "skill": kinds[i],
            **{method: texts[place] for method, texts in answered.items()},
        }
        for place, i in enumerate(chosen)
    ]
