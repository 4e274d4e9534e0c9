"""One typed, frozen configuration for a whole run: TOML in, TOML out, `-s key=value` on top.

Every key carries a one-line description, which `apiary config` prints and the docs repeat. Unknown keys are
refused with the nearest known name, and all problems of a file are reported together.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from apiary.config import toml_text
from apiary.core.database_uris import holds_secret, is_uri, refusal
from apiary.core.errors import UserError as UserError


class _Section(BaseModel):
    # Strict: `clients = true` is a slip, not one client. Infinite numbers have no sensible meaning at any key.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, values: Any) -> Any:
        """TOML and JSON know only lists, and a frozen tree holds only tuples."""
        if not isinstance(values, dict):
            return values
        return {k: _tuples(v) for k, v in values.items()}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


class Method(BaseModel):
    """A registered method by name, with its options: `"iid"` or `{ name = "dirichlet", alpha = 0.3 }`."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str

    @property
    def options(self) -> dict[str, Any]:
        """The options beside the name."""
        return dict(self.model_extra or {})


def _method(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


MethodField = Annotated[Method, BeforeValidator(_method, json_schema_input_type=str | Method)]


class ModelConfig(_Section):
    """The frozen base model."""

    name: str = Field("builtin:tiny", description="builtin:tiny, a Hugging Face hub id, or a folder")
    revision: str | None = Field(None, description="hub revision (branch, tag or commit) of the model")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="data type of the frozen base: float32, bfloat16, or auto, which is bfloat16 where the device "
        "supports it",
    )
    quantization: Literal["none", "int8", "nf4"] = Field(
        "none", description="hold the base in 8 bits (int8) or 4 (nf4) by bitsandbytes on CUDA; or none"
    )


class AdapterConfig(_Section):
    """The adapter that is trained and travels."""

    kind: Literal["lora"] = Field("lora", description="kind of adapter: lora is the only one")
    rank: int = Field(16, ge=1, le=1024, description="rank of the two LoRA factors")
    alpha: float = Field(16.0, gt=0, description="LoRA alpha: the update is scaled by alpha/rank (see scaling)")
    scaling: Literal["rslora", "lora"] = Field("rslora", description="rslora: alpha/sqrt(rank); lora: alpha/rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input while training")
    targets: str | tuple[str, ...] = Field(
        "all-linear", description="all-linear, or a list of module name endings such as q_proj"
    )
    train: Literal["both", "b", "alternate"] = Field(
        "both", description="factors that clients train: both, b (FFA-LoRA), or alternate: b and a in turns (RoLoRA)"
    )
    share: Literal["both", "a"] = Field(
        "both", description="factors that travel: both, or a: each client keeps a b of its own (FedSA-LoRA)"
    )
    init: Literal["kaiming", "orthonormal"] = Field(
        "kaiming",
        description="initial A: kaiming, or orthonormal, whose rows lose least where A is never trained (train = b)",
    )

    ranks: tuple[int, ...] | Literal["memory"] = Field(
        (),
        description="ranks of the clients in turn, each at most `rank`; empty: all have "
        "`rank`; memory: as high as fits "
        "each client's device (a site may set its own)",
    )

    start: str | None = Field(
        None,
        description="an adapter folder, made by any tool with peft's LoRA, or a run, that training begins from; what "
        "this table does not set of rank, alpha, scaling and targets is as it is there",
    )
    start_digest: str | None = Field(
        None, description="digest of the adapter in `start`; the run sets it, and goes on from no other"
    )

    def of_rank(self, rank: int) -> AdapterConfig:
        """The adapter of a client of this rank, whatever it begins from."""
        return self.model_copy(update={"rank": rank, "ranks": (), "start": None, "start_digest": None})

    def trained(self, round_number: int) -> Literal["both", "b", "a"]:
        """The factors that are trained in a round, from 1; b comes first, for while it is zero, a gets no gradient."""
        if self.train == "alternate":
            return "b" if round_number % 2 else "a"
        return self.train


class DataConfig(_Section):
    """Where the instruction data comes from and how it is spread over clients."""

    source: str = Field(
        "builtin:skills:250",
        description="builtin:skills (with :N, N training rows of each skill), a file, a folder (one file per client), "
        "a database by URI, or a hub id",
    )
    split: str = Field("train", description="split of a hub data set, of a save_to_disk folder, or of a JSON object")
    query: str | None = Field(None, description="one SELECT that gives the rows, where the source is a database")
    test: str | None = Field(
        None, description="a separate source of held-out rows; unset: part of each client's rows, by content hash"
    )
    test_fraction: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="fraction of each client's rows that is held out, chosen by a hash of the question; "
        "a site pins the first it is asked for and refuses others (apiary deploy split)",
    )
    columns: Mapping[str, str] = Field(
        default_factory=dict,
        description="your names: { instruction = ..., input = ..., output = ... }, { messages = ... } or "
        "{ text = ... }; the first two with system = ... and tools = ... where there are such columns, the first with "
        "thinking = ... too",
    )
    clients: int = Field(
        8,
        ge=1,
        description="number of clients, who share the rows of the source: with fewer, each has more (ignored by the "
        "natural partition)",
    )
    partition: MethodField = Field(
        Method(name="dirichlet", alpha=0.3, by="skill"),
        description="iid, dirichlet, by_value, pathological, size or natural, with options",
    )
    max_rows: int | None = Field(None, ge=1, description="use at most this many rows of the source; sites refuse it")

    @model_validator(mode="after")
    def _no_secret_in_a_uri(self) -> Self:
        for name in ("source", "test"):
            value = getattr(self, name)
            if value is not None and is_uri(value) and holds_secret(value):
                raise ValueError(refusal(f"data.{name}"))
        return self


class PromptConfig(_Section):
    """How an example becomes tokens."""

    template: str = Field(
        "auto",
        description="chat (the tokenizer's own), alpaca, plain, or a file with {instruction} and {response}, and "
        "{system} if you like; auto: chat where the tokenizer has a chat template, else alpaca",
    )
    system: str | None = Field(None, description="a system message put before every conversation without one")
    max_tokens: int = Field(512, ge=8, description="longest example in tokens; see on_long")
    on_long: Literal["truncate", "drop"] = Field(
        "truncate", description="truncate or drop longer examples; counted and reported either way"
    )
    boundary: Literal["plain", "structured"] = Field(
        "plain",
        description="plain, or structured: data (input and context columns, what tools say) stands between delimiters "
        "that no text can produce, and rows with instructions planted in their data are trained (StruQ)",
    )
    injected: float = Field(
        0.5,
        ge=0,
        le=1,
        description="with boundary = structured: share of the training rows with data that get an instruction planted "
        "in it, to be answered as if it were not there",
    )


class TrainConfig(_Section):
    """Local training at a client."""

    objective: str = Field("sft", description="per-example loss: sft")
    steps: int | None = Field(None, ge=1, description="optimizer steps of a client per round; set this or epochs")
    epochs: float | None = Field(None, gt=0, description="passes over the client's data per round; set this or steps")
    batch_tokens: int = Field(1024, ge=16, description="padded tokens in one forward pass")
    accumulate: int = Field(1, ge=1, description="forward passes per optimizer step")
    optimizer: Literal["adamw", "sgd"] = Field(
        "adamw", description="adamw, or sgd without momentum; not used by fedkseed"
    )
    lr: float = Field(6e-3, gt=0, description="peak learning rate")
    lr_b: float = Field(
        1.0,
        gt=0,
        description="learning rate of the B factors over lr (LoRA+ has 16 or so); 1 = the same; scaffold and fedkseed "
        "refuse another",
    )
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="cosine or constant learning rate over the whole federated run, after warm-up"
    )
    warmup: float = Field(
        0.03, ge=0, lt=1, description="fraction of the run's steps in which the learning rate rises to lr"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay of AdamW")
    clip_norm: float = Field(
        1.0,
        ge=0,
        description="largest L2 norm of a step's gradient, clipped above it; 0 = no limit; not used by fedkseed",
    )
    penalties: tuple[MethodField, ...] = Field(
        (), description='terms added to the loss, e.g. [{ name = "fedprox", mu = 0.01 }]'
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of one client; unset: all cores")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("train.steps and train.epochs are exclusive: set one of them")
        return self


class CurateConfig(_Section):
    """Curation of a client's rows before training; only row counts leave the client."""

    steps: tuple[MethodField, ...] = Field(
        (),
        description="steps in the order they run: mask, duplicates, near_duplicates, "
        "length, held_out, ifd, random, with options",
    )
    every: int = Field(
        0, ge=0, description="curate again, with the current adapter, every n rounds; 0 = once, before the first round"
    )


class ContinualConfig(_Section):
    """Continual learning: tasks that come one after the other, and replay of earlier ones."""

    by: str = Field("skill", description="column of the data whose values are the tasks")
    stages: tuple[tuple[str, ...], ...] = Field(
        (), description='values of that column, stage by stage: [["sort", "count"], ["lookup"]]; empty: no stages'
    )
    buffer: float = Field(
        0.0,
        ge=0,
        description="size of a client's replay buffer: below 1 a fraction of its training rows, else a number of rows, "
        "2 or more",
    )
    replay: float = Field(
        0.5, gt=0, lt=1, description="fraction of each step's tokens that comes from the replay buffer"
    )
    policy: Literal["reservoir", "poisson"] = Field(
        "reservoir",
        description="how rows enter the buffer: reservoir keeps exactly `buffer` rows; "
        "poisson keeps each row independently",
    )

    @model_validator(mode="after")
    def _fraction_or_number(self) -> Self:
        if self.buffer >= 1 and (self.buffer < 2 or self.buffer != int(self.buffer)):
            whole = "; for nearly all rows set 0.999" if self.buffer == 1 else ""
            raise ValueError(
                f"continual.buffer = {self.buffer:g}: must be a fraction below 1, such as 0.1, or a whole number of "
                f"rows from 2{whole}"
            )
        return self

    @model_validator(mode="after")
    def _one_stage_each(self) -> Self:
        values = [value for stage in self.stages for value in stage]
        if twice := next((value for value in values if values.count(value) > 1), None):
            raise ValueError(f"continual.stages names {twice!r} twice: a task belongs to one stage")
        if not all(self.stages):
            raise ValueError("continual.stages holds an empty stage: name at least one value in each")
        return self


class PrivacyConfig(_Section):
    """Differential privacy of the rows that clients hold."""

    unit: Literal["none", "record"] = Field(
        "none", description="none, or record: differential privacy for each row of a client (DP-SGD, DP-Adam)"
    )
    epsilon: float = Field(
        8.0, gt=0, description="epsilon of the (epsilon, delta) guarantee, for each row over all rounds"
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="delta of the (epsilon, delta) guarantee; well below 1 / rows")
    clip: float = Field(1.0, gt=0, description="clipping norm: largest L2 norm of one row's gradient")
    batch_rows: int = Field(
        64, ge=1, description="expected batch size in rows; each row is drawn independently (Poisson sampling)"
    )
    noise_multiplier: float | None = Field(
        None,
        ge=0.01,
        description="standard deviation of the noise over clip; unset: the smallest that "
        "keeps the planned rounds within epsilon",
    )
    accountant: Literal["pld", "rdp"] = Field(
        "pld",
        description="how epsilon is computed and the budget held: pld (tight; rdp is reported beside it) or "
        "rdp (looser, and then alone)",
    )


class StrategyConfig(_Section):
    """How the server aggregates a round."""

    name: str = Field(
        "fedavg",
        description="aggregation method: fedavg, auto, ... (see docs/aggregation.md), or module:function of your own",
    )
    options: Mapping[str, Any] = Field(default_factory=dict, description="options of the method")
    root: str | None = Field(None, description="for fltrust: a source of about 100 rows that the server trusts")
    server_optimizer: MethodField = Field(
        Method(name="auto"),
        description="server optimizer applied to the aggregated update: auto (docs/tuning.md), none, plain, momentum, "
        "nesterov, adam, yogi or adagrad, with options",
    )
    weighting: Literal["tokens", "uniform"] = Field(
        "tokens", description="weight of a client's update: tokens (as many as it trained) or uniform"
    )
    norm_guard: float = Field(
        5.0,
        ge=0,
        description="longest change of a client over the median one of the round or of the rounds before; beyond it, "
        "or beyond what the optimizer can do, it is refused (docs/poisoning.md); 0 = no limit",
    )
    weight_cap: float = Field(
        3.0,
        ge=0,
        description="largest weight of a client over the median one, likewise; what is above it does not count; 0 = no "
        "limit",
    )
    fraction: float = Field(1.0, gt=0, le=1, description="fraction of the clients asked in each round (the cohort)")
    min_clients: int = Field(
        2, ge=1, description="smallest cohort; also the number of clients to wait for before round 1"
    )
    quorum: float = Field(
        0.5, gt=0, le=1, description="fraction of the cohort that must return a valid update, or the run fails"
    )
    deadline_s: float = Field(0.0, ge=0, description="seconds to wait for the replies of a round; 0 = no limit")
    join_timeout_s: float = Field(
        120.0, gt=0, description="seconds to wait for clients before a round: for min_clients, at the start for all"
    )

    @model_validator(mode="after")
    def _limits_above_the_median(self) -> Self:
        for name in ("norm_guard", "weight_cap"):
            if 0 < getattr(self, name) < 1:
                raise ValueError(f"strategy.{name} = {getattr(self, name):g}: set 1 or more, or 0 for no limit")
        return self

    def cohort_size(self, clients: int) -> int:
        """How many of so many clients are asked in a round."""
        return cohort_size(clients, self.fraction, self.min_clients)


class WireConfig(_Section):
    """How the change of an adapter travels; docs/wire.md says which codec is for what."""

    up: MethodField = Field(
        Method(name="fp32"),
        description="codec from client to server: fp32, bf16, int8, int4, topk or sparse, with options",
    )
    down: MethodField = Field(
        Method(name="fp32"),
        description="codec from server to client, the same choice; all but fp32 send changes, and clients keep a copy",
    )


class EvaluateConfig(_Section):
    """What is measured, and when."""

    every: int = Field(1, ge=0, description="evaluate the shared adapter every n rounds; 0 = only at the end")
    limit: float = Field(
        1.5,
        ge=0,
        description="end the run, before the round is kept, at a loss that is no number or above limit times that "
        "before training, plus 1; 0 = never",
    )
    max_examples: int = Field(240, ge=1, description="held-out examples used for the table")
    clients: bool | None = Field(
        None,
        description="also ask the clients for the loss on their own held-out rows; unset: unless privacy forbids it",
    )
    generate: bool = Field(True, description="measure exact-match accuracy by greedy decoding for the table")
    max_new_tokens: int = Field(24, ge=1, description="longest answer decoded, in tokens")
    baselines: tuple[Literal["base", "local", "central", "central_serial"], ...] = Field(
        ("base", "local", "central", "central_serial"),
        description="what the federated model is compared with in the table: base (untuned), local (each client "
        "alone), central (all data pooled, in as many steps as all clients make together), central_serial (the same in "
        "as many steps as one client makes, each on as many tokens as all clients); each but base takes as long as "
        "the training of all clients",
    )
    patience: int = Field(
        0,
        ge=0,
        description="stop after this many evaluations without a better loss, and deliver the best round; half of the "
        "held-out rows decide, the figures are on the others; 0 = never stop, deliver the last round, keep the best",
    )
    samples: int = Field(
        6,
        ge=0,
        description="held-out prompts whose answers are shown in the report, also where generate is off; they are "
        "text of your rows",
    )
    set_apart: bool = Field(
        False,
        description="keep half of the held-out rows out of all figures, to choose between runs by; their loss is "
        "`deciding` in metrics.json; apiary sweep sets it",
    )


class PersonalConfig(_Section):
    """A model of its own for each client, made at home after the last round."""

    enabled: bool = Field(
        False,
        description="after the last round each client makes models of its own from the federated one and from training "
        "alone, and keeps the one that its validation rows are for; a site of a deployment does so when its operator "
        "asks it to (apiary deploy personal)",
    )
    validation: float = Field(
        0.15,
        gt=0,
        lt=1,
        description="fraction of a client's training rows that is set apart before round 1, by a seeded hash of the "
        "question: nothing is trained on them, and they alone choose",
    )
    weights: tuple[float, ...] = Field(
        (0.25, 0.5, 0.75),
        description="weights of training alone in the mixtures with the federated model, each between 0 and 1",
    )
    budget: float = Field(
        2.0,
        ge=2,
        description="optimizer steps that each contender may have in all, as a multiple of those that the client made "
        "in the federation",
    )
    lr_factor: float = Field(
        0.333, gt=0, description="learning rate with which the federated model is tuned further, over train.lr"
    )
    margin: float = Field(
        1.0,
        ge=0,
        description="of the candidates within so many standard errors of the lowest validation loss the one nearest to "
        "the federated model is kept; 0: the lowest loss",
    )

    @model_validator(mode="after")
    def _between(self) -> Self:
        if odd := [weight for weight in self.weights if not 0 < weight < 1]:
            raise ValueError(
                f"personal.weights names {odd[0]:g}: give weights between 0 and 1, such as 0.5; the federated model "
                "and training alone are candidates by themselves"
            )
        return self


class SimulateConfig(_Section):
    """How a simulation runs, who is away or fails in it, and its attackers."""

    engine: Literal["local", "ray"] = Field("local", description="local: one process; ray: Flower's engine on Ray")
    cpus_per_client: int = Field(1, ge=1, description="CPU cores of one Ray worker")
    gpus_per_client: float = Field(0.0, ge=0, description="GPUs of one Ray worker, such as 0.5")
    away: float = Field(
        0.0, ge=0, lt=1, description="fraction of the clients that are away in a round, others in every round"
    )
    failing: float = Field(
        0.0, ge=0, lt=1, description="fraction of the clients that fail in a round if they are asked, likewise"
    )
    relays: int = Field(
        0,
        ge=0,
        description="relays between clients and server, each of which adds up the answers of its share of the clients "
        "(docs/scale.md); 0 = none",
    )
    attackers: float = Field(
        0.0, ge=0, lt=1, description="fraction of the clients that attack, to measure how robust a method is; 0 = none"
    )
    attack: MethodField = Field(
        Method(name="sign_flip"),
        description="what attackers send: sign_flip, drift, scaled, gaussian, alie, "
        "inner_product, gauge, not_a_number or trigger, "
        "with options",
    )


class LogConfig(_Section):
    """Experiment trackers beside the run directory."""

    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio", "comet_ml"], ...] = Field(
        (), description="tensorboard, wandb, mlflow, trackio, comet_ml, through accelerate; each needs its own package"
    )
    project: str = Field("apiary", description="project name given to the trackers")


class RunConfig(_Section):
    """A whole run."""

    seed: int = Field(0, ge=0, lt=2**63, description="seed of all randomness but that of privacy noise")
    rounds: int = Field(12, ge=1, description="federated rounds")
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = DataConfig()
    prompt: PromptConfig = PromptConfig()
    train: TrainConfig = TrainConfig(steps=3)
    curate: CurateConfig = CurateConfig()
    continual: ContinualConfig = ContinualConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    strategy: StrategyConfig = StrategyConfig()
    wire: WireConfig = WireConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    personal: PersonalConfig = PersonalConfig()
    simulate: SimulateConfig = SimulateConfig()
    log: LogConfig = LogConfig()

    @property
    def scores_from_clients(self) -> bool:
        """Whether clients tell the loss on their own held-out rows."""
        return self.privacy.unit == "none" if self.evaluate.clients is None else self.evaluate.clients

    @model_validator(mode="before")
    @classmethod
    def _default_steps(cls, values: Any) -> Any:
        """A [train] table that names neither steps nor epochs gets the default number of steps."""
        if isinstance(values, dict) and isinstance(values.get("train"), dict):
            train = values["train"]
            if train.get("steps") is None and train.get("epochs") is None:
                values = {**values, "train": {**train, "steps": 3}}
        return values

    def to_json(self) -> str:
        """The whole configuration as one JSON text (what travels in Flower's run config)."""
        return self.model_dump_json()

    def to_toml(self, without: Collection[str] = ()) -> str:
        """The configuration as TOML, `without` the tables named; `parse(text)` gives a whole one back as it was."""
        return toml_text.dump(
            {name: value for name, value in self.model_dump(mode="json").items() if name not in without}
        )


def cohort_size(clients: int, fraction: float, minimum: int) -> int:
    """How many of so many clients a round asks: a fraction of them, but at least `minimum` where there are as many."""
    return min(clients, max(minimum, math.ceil(fraction * clients - 1e-9)))
