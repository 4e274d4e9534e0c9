"""The shape of `metrics.json` (schema 1) as the report reads it, checked once and for all.

Everything but the table may be missing. Losses are nats per response token, accuracies shares in
0..1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from apiary.config import gauged
from apiary.core.errors import UserError
from apiary.evaluation import intervals

MethodName: TypeAlias = Literal["base", "start", "local", "federated", "central", "central_serial"]
Outcome: TypeAlias = Literal["gain", "lose", "cannot tell"]
OUTCOMES: tuple[Outcome, ...] = ("gain", "lose", "cannot tell")
METHODS: tuple[MethodName, ...] = ("base", "start", "local", "federated", "central", "central_serial")
Interval: TypeAlias = tuple[float, float]
_Interval: TypeAlias = Annotated[Interval | None, BeforeValidator(lambda ends: None if ends and None in ends else ends)]

OwnName: TypeAlias = MethodName | Literal["local_best", "personal"]  # what a client's own rows are measured with
OWN_NAMES: tuple[OwnName, ...] = ("local", "local_best", "federated", "personal")  # of the table of own models

MEANING: Mapping[MethodName, tuple[str, str]] = {
    "base": ("Untuned", "the model as it came, before any training"),
    "start": ("The start", "the adapter that training began from (adapter.start)"),
    "local": ("Training alone", "each client trains on its own data only; average over clients"),
    "federated": ("Federated", "clients train one model together; their data never leaves them"),
    "central": ("All data pooled", "all data in one place, in the steps of all clients together"),
    "central_serial": (
        "Pooled, serial steps",
        "all data in one place, in the steps of one client, each on the tokens of all",
    ),
}
"""A name for a chart and a sentence for a reader, by method."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Intervals(_Part):
    """95% intervals of a row, over the held-out examples alone."""

    loss: _Interval = None
    accuracy: _Interval = None


class Row(_Part):
    """One method on the common held-out examples."""

    method: MethodName
    loss: float | None
    accuracy: float | None = None
    n: int | None = None
    ci95: Intervals = Intervals()
    steps: int | None = None  # optimizer steps; of `local`, as the next two, the mean over clients
    rows: int | None = None  # different training rows that its batches were drawn from
    tokens: int | None = None  # response tokens trained, each as often as it was
    not_alike: Mapping[str, str] = Field(default_factory=dict)  # of a baseline: why it is no fair comparison


class Difference(_Part):
    """The federated loss minus another method's, example by example; below 0 where federated is better.

    Its interval is over these examples alone, of these two models: another seed makes others.
    """

    difference: float | None = None
    ci95: _Interval = None  # `intervals.over_rows` of the pairs; None where there are too few examples for one
    n: int | None = None


class RowsOfChoice(_Part):
    """How many rows made a client's own model, and which chose it."""

    train: int | None = None
    validation: int | None = None
    chosen_by: str = ""


class OwnModel(_Part):
    """A client's own model, which it chose by validation rows; losses are on its reported rows."""

    kept: Literal["federated", "earlier", "mixed", "tuned", "alone"]
    weight: float = 0.0  # of training alone in it
    steps: int | None = None  # optimizer steps on the client's rows behind it
    federation_steps: int | None = None
    alone_steps: int | None = None  # of training alone where it is best
    why: str = ""
    rows: RowsOfChoice = RowsOfChoice()
    own: Mapping[OwnName, float | None] = Field(default_factory=dict)
    own_ci95: Mapping[OwnName, _Interval] = Field(default_factory=dict)
    own_paired: Mapping[OwnName, Difference] = Field(default_factory=dict)  # the own model less each other
    mix_loss: Mapping[OwnName, float | None] = Field(default_factory=dict)  # on everyone's rows
    curves: Mapping[str, tuple[tuple[int, float | None], ...]] = Field(default_factory=dict)


class OwnRow(_Part):
    """One way of training in the table of own models; means over clients."""

    method: OwnName
    own: float | None = None  # loss on the clients' own rows
    own_ci95: _Interval = None  # over clients
    steps: int | None = None
    mix: float | None = None  # loss on everyone's rows


class OwnModels(_Part):
    """What the clients' own models come to."""

    set_apart: bool = True  # whether the rows that chose were out of the training from the start
    table: tuple[OwnRow, ...] = ()


class Client(_Part):
    """What a client holds, and how each method does on its own held-out examples and on all."""

    client: str
    examples: int | None = None  # None where record-level privacy withholds it
    tokens: int | None = None
    counts: str = "exact"  # how a site tells them: exact, rounded or declared
    mix: Mapping[str, int] = Field(default_factory=dict)
    rank: int | None = None  # of what it trains
    steps: int | None = None  # optimizer steps in the federation; 0 where it never took part
    own: Mapping[OwnName, float | None] = Field(default_factory=dict)
    own_paired: Mapping[MethodName, Difference] = Field(default_factory=dict)
    personal: OwnModel | None = None  # where clients chose models of their own
    mix_loss: Mapping[MethodName, float | None] = Field(default_factory=dict)
    mix_paired: Mapping[MethodName, Difference] = Field(default_factory=dict)


class OwnRound(_Part):
    """The shared model on each site's own held-out rows after a round; round 0 is before training."""

    round: int
    loss: float | None = None  # of all these rows together, as `apiary.core.counts` has it
    sites: Mapping[str, float | None] = Field(default_factory=dict)
    rows: Mapping[str, tuple[int, int]] = Field(default_factory=dict)  # held-out rows, and response tokens in them
    few: tuple[str, ...] = ()  # sites with too few rows to tell a loss


class RoundGauge(_Part):
    """How far averaging A and B apart ended from the mean of the products, as a share of what the clients changed.

    The rest says how much of that an exact method would take away.
    """

    relative: float | None = None  # None where the clients' changes cancel
    stderr: float | None = None
    by_adding: float | None = Field(None, validation_alias=gauged.ADDING_RANKS)  # by ranks that it adds to the base
    in_rank: float | None = Field(None, validation_alias=gauged.KEEPING_RANK)  # in factors of the adapter's rank


class Traits(_Part):
    """What the run's log tells of its aggregation method, as `strategies.traits` gives it.

    A run of an earlier version tells nothing, which leaves all as it stands here.
    """

    averages: str = ""  # whether rounds average A and B apart: "always", "sometimes", "never"; "": not known
    recovers: str = ""  # what it makes of the error of that: "all", "bounded", "rank", or "", nothing or not known
    takes_one: bool = False
    threshold: float | None = None
    scalars: int = 0


class Delivered(_Part):
    """Which round is delivered, and by which rows that was decided; see `apiary.tracking.delivery`."""

    round: int
    last: int
    best: int | None = None
    rows: str = ""
    kept: str = ""


class Round(_Part):
    """One federated round; round 0 is the state before training."""

    round: int
    loss: float | None = None
    ci95: _Interval = None
    train_loss: float | None = None
    bytes_up: int | None = None
    bytes_down: int | None = None  # to be trained
    bytes_evaluate: int | None = None  # to be measured, also to the clients
    float32_up: int | None = None  # where a codec is used, what the same would have been without
    float32_down: int | None = None
    float32_evaluate: int | None = None
    seconds: float | None = None
    clients: int | None = None
    gauge: RoundGauge | None = None
    method: str | None = None  # where the run chose one by the round
    shares: Mapping[str, float | None] = Field(default_factory=dict)  # by client, of a robust method
    cut: Mapping[str, str] = Field(default_factory=dict)  # by client, why it counted for little or nothing
    unchanged: bool = False  # whether too few good answers left the model as it was
    dropped: float | None = None  # of the squared norm of what stands in the base, lost to its rank's bound

    @property
    def down(self) -> int:
        """Bytes to the clients."""
        return (self.bytes_down or 0) + (self.bytes_evaluate or 0)

    @property
    def spared(self) -> int:
        """Bytes that codecs spared, both ways."""
        pairs = (
            (self.float32_up, self.bytes_up),
            (self.float32_down, self.bytes_down),
            (self.float32_evaluate, self.bytes_evaluate),
        )
        return sum(plain - (sent or 0) for plain, sent in pairs if plain is not None)


class Sample(_Part):
    """A held-out prompt with the answers of each method."""

    prompt: str
    reference: str
    skill: str | None = None
    base: str | None = None
    start: str | None = None
    local: str | None = None
    federated: str | None = None
    central: str | None = None
    central_serial: str | None = None


Matrix: TypeAlias = tuple[tuple[float | None, ...], ...]


class StageScores(_Part):
    """One model on the held-out examples of each stage."""

    losses: tuple[float | None, ...]
    accuracies: tuple[float | None, ...] | None = None


class Continual(_Part):
    """A run whose tasks came in stages; row t of a matrix holds the scores of each stage after t finished stages."""

    by: str = ""
    stages: tuple[tuple[str, ...], ...]
    buffer: float = 0.0
    loss: Matrix
    accuracy: Matrix | None = None
    joint: Mapping[MethodName, StageScores] = Field(default_factory=dict)
    overall: Mapping[str, tuple[float | None, ...]] = Field(default_factory=dict)
    backward_transfer: Mapping[str, float | None] = Field(default_factory=dict)
    forgetting: Mapping[str, float | None] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        width = len(self.stages)
        for matrix in (self.loss, self.accuracy or ()):
            if len(matrix) > width + 1 or any(len(row) != width for row in matrix):
                raise ValueError(f"its matrices must have a column for each of {width} stages and at most a row more")
        return self


class CurationPart(_Part):
    """What curation left of a client's rows, and what each step dropped."""

    rows: int
    kept: int
    dropped: Mapping[str, int] = Field(default_factory=dict)


class Attack(_Part):
    """What the attackers of a simulation did."""

    name: str
    clients: tuple[str, ...]  # that attacked
    answer: str | None = None  # of an attack by a hidden phrase: what is to be answered wherever it is asked
    asked: int = 0  # held-out questions with the phrase
    answered: Mapping[MethodName, float] = Field(default_factory=dict)  # the share of them with that answer


class Metrics(_Part):
    """A run's results."""

    run: str = ""
    task: str = ""
    table: tuple[Row, ...]
    clients: tuple[Client, ...] = ()
    skills: Mapping[str, Mapping[MethodName, float | None]] = Field(default_factory=dict)
    paired: Mapping[MethodName, Difference] = Field(default_factory=dict)
    rounds: tuple[Round, ...] = ()
    sites: tuple[OwnRound, ...] | None = None  # None where it is no deployment
    samples: tuple[Sample, ...] = ()
    continual: Continual | None = None
    curation: Mapping[str, CurationPart] = Field(default_factory=dict)
    share: str = "both"  # `adapter.share`
    personal: OwnModels | None = None  # where clients chose models of their own
    each_has: str = ""  # what clients have for models, where not all have the same one
    rank: int | None = None  # of the adapter that is exported
    delivered: Delivered | None = None  # None in a run of an earlier version
    attack: Attack | None = None  # of a simulation with attackers
    privacy: Mapping[str, Any] = Field(default_factory=dict)
    seconds: float | None = None
    machine: Mapping[str, Any] = Field(default_factory=dict)
    versions: Mapping[str, Any] = Field(default_factory=dict)

    def row(self, method: MethodName) -> Row | None:
        """The row of a method that has a loss, or None."""
        return next((r for r in self.table if r.method == method and r.loss is not None), None)

    @property
    def honest(self) -> tuple[Client, ...]:
        """All clients but those that a simulation made attack."""
        return tuple(c for c in self.clients if self.attack is None or c.client not in self.attack.clients)

    @property
    def mixed(self) -> bool:
        """Whether clients have several ranks."""
        return len({client.rank for client in self.clients} - {None}) > 1

    @property
    def before(self) -> float | None:
        """The loss on the held-out examples before any training, as it was measured then."""
        return next((r.loss for r in self.rounds if r.round == 0), None)

    @property
    def lost(self) -> bool:
        """Whether the federated model has a row, but gives no number there."""
        return any(r.method == "federated" and r.loss is None for r in self.table)

    @property
    def private(self) -> bool:
        """Whether the federation trained under differential privacy."""
        return bool(self.privacy.get("unit", "none") != "none")

    @property
    def noiseless(self) -> tuple[MethodName, ...]:
        """Methods of a private run that trained without its noise: nobody is shown what they make."""
        return tuple(m for m in METHODS if m not in ("base", "start", "federated") and self.private and self.row(m))

    @property
    def unlike(self) -> Mapping[MethodName, Mapping[str, str]]:
        """Of each baseline that is no fair comparison, why: a key and a sentence's end for each reason."""
        found = {m: row.not_alike for m in METHODS if (row := self.row(m)) is not None}
        for method in self.noiseless:  # earlier versions did not write it down
            found[method] = {"noise": "went without the noise of differential privacy", **found[method]}
        return {method: reasons for method, reasons in found.items() if reasons}

    @property
    def joined(self) -> bool:
        """Whether several clients took part, as far as is known: else nothing was federated."""
        told = [client.steps for client in self.clients if client.steps is not None]
        return sum(steps > 0 for steps in told) > 1 if told else len(self.clients) != 1


class Gain(_Part):
    """How clients fare by joining: their loss alone minus the federated loss, in nats per token."""

    gains: Mapping[str, float]
    paired: Mapping[str, Difference] = Field(default_factory=dict)  # by client, federated minus alone, row by row

    def outcome(self, client: str) -> Outcome:
        """Whether a client gains or loses by the interval over its rows, or cannot tell."""
        pair = self.paired.get(client)
        if pair is None or pair.ci95 is None:
            return "cannot tell"
        low, high = pair.ci95
        return "gain" if high < 0 else "lose" if low > 0 else "cannot tell"

    def count(self, outcome: Outcome) -> int:
        """How many clients have an outcome."""
        return sum(self.outcome(client) == outcome for client in self.gains)

    @property
    def rows(self) -> tuple[int, int] | None:
        """The fewest and the most rows that the outcome of a client rests on; None where they are not told."""
        counts = [pair.n for name in self.gains if (pair := self.paired.get(name)) and pair.n is not None]
        return (min(counts), max(counts)) if counts else None

    @property
    def mean(self) -> float:
        """The mean over clients."""
        return sum(self.gains.values()) / len(self.gains)

    @property
    def mean_ends(self) -> Interval | None:
        """The 95% interval of the mean over clients; None of one client."""
        return intervals.over_clients(list(self.gains.values()))

    @property
    def worst(self) -> tuple[str, float]:
        """The client that gains least, and its gain."""
        return min(self.gains.items(), key=lambda item: (item[1], item[0]))


def gain_on_own(metrics: Metrics) -> Gain | None:
    """The gain of each honest client on its own held-out examples; None where it was not measured, or nobody joined."""
    if not metrics.joined:
        return None
    return gain_of(
        (c.client, c.own.get("local"), c.own.get("federated"), c.own_paired.get("local")) for c in metrics.honest
    )


def gain_by_own_model(metrics: Metrics) -> Gain | None:
    """The gain of each honest client by its own model, over training alone where that is best; None without any."""
    return gain_of(
        (
            c.client,
            c.personal.own.get("local_best"),
            c.personal.own.get("personal"),
            c.personal.own_paired.get("local_best"),
        )
        for c in metrics.honest
        if c.personal is not None
    )


def gain_of(
    losses: Iterable[tuple[str, float | None, float | None, Difference | Mapping[str, Any] | None]],
) -> Gain | None:
    """The gain of each client; None where no pair of losses is whole.

    Args:
        losses: of each client its name, its loss alone, the federated loss, and the two row by row if compared so.
    """
    gains: dict[str, float] = {}
    paired: dict[str, Any] = {}
    for name, alone, joint, pair in losses:
        if alone is not None and joint is not None:
            gains[name] = alone - joint
            if pair is not None:
                paired[name] = pair
    return Gain.model_validate({"gains": gains, "paired": paired}) if gains else None


def gain_on_all(metrics: Metrics) -> Gain | None:
    """The gain of each honest client on the held-out examples of all; None where not measured, or nobody joined."""
    row = metrics.row("federated")
    if row is None or row.loss is None or not metrics.joined:
        return None
    return gain_of((c.client, c.mix_loss.get("local"), row.loss, c.mix_paired.get("local")) for c in metrics.honest)


def parse_metrics(values: Mapping[str, Any], name: str = "metrics.json") -> Metrics:
    """The results in `values`.

    Raises:
        UserError: a part has another shape than this version writes.
    """
    try:
        return Metrics.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        message = first["msg"][0].lower() + first["msg"][1:]
        raise UserError(f"{name}: {key}: {message}; was the file edited or written by another version?") from None
