"""A search by Optuna: its samplers, its pruners, and its storage, from which a killed search goes on.

Settings are counted from 0 as Optuna counts its trials. A setting is a function of the sweep's seed, its number and
what was measured before it, whether or not the search was killed in between.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from apiary.config import toml_text
from apiary.core.errors import UserError
from apiary.core.seeds import derive_seed
from simulation.sweep import space
from simulation.sweep.definition import Sweep
from simulation.sweep.space import Axis, Choice, Values

FILE: Final = "study.db"
_ABSENT = "a search needs Optuna: pip install 'apiary[sweep]'; a grid of values (-s KEY=A,B,C) does without it"


def need() -> ModuleType:
    """Optuna.

    Raises:
        UserError: it is not installed; the line says how to.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise UserError(_ABSENT) from None
    return optuna


class Search:
    """The settings of a search: drawn one after the other, each once what came before is known.

    State: Optuna's study in the sweep's folder, an SQLite file, which only the process of the sweep writes.

    Args:
        folder: of the sweep.
        sweep: what is searched.

    Raises:
        UserError: Optuna is not installed, or the file is no study.
    """

    def __init__(self, folder: Path, sweep: Sweep) -> None:
        self._optuna, self._sweep = need(), sweep
        self._optuna.logging.set_verbosity(self._optuna.logging.ERROR)
        self._distributions = {axis.key: _distribution(self._optuna, axis) for axis in sweep.axes}
        new = not (folder / FILE).exists()
        with _quiet():
            try:
                self._study = self._optuna.create_study(
                    storage=f"sqlite:///{folder / FILE}",
                    study_name="sweep",
                    direction="minimize",
                    load_if_exists=True,
                    pruner=_pruner(self._optuna, sweep),
                )
            except Exception as error:  # SQLAlchemy's and Optuna's own share no other base
                raise UserError(
                    f"{FILE} cannot be opened ({type(error).__name__}); was it edited? Choose another --out"
                ) from None
        if new and (own := space.own(sweep.base, sweep.axes)) is not None:
            self._study.enqueue_trial({axis.key: _stored(axis, own[axis.key]) for axis in sweep.axes})

    @property
    def settings(self) -> list[Values]:
        """Those drawn so far, by number."""
        return [self._values(trial.params) for trial in self._trials()]

    @property
    def open(self) -> list[int]:
        """The numbers of those whose runs are not all told."""
        running = self._optuna.trial.TrialState.RUNNING
        return [trial.number for trial in self._trials() if trial.state == running]

    def _trials(self) -> list[Any]:
        waiting = self._optuna.trial.TrialState.WAITING
        return [trial for trial in self._study.get_trials(deepcopy=False) if trial.state != waiting]

    def ask(self) -> int:
        """Draw the next setting; returns its number."""
        self._study.sampler = self._sampler(len(self._trials()))
        with _quiet():
            return int(self._study.ask(fixed_distributions=self._distributions).number)

    def report(self, number: int, step: int, loss: float) -> bool:
        """Tell a loss on the way; returns whether the setting should be given up.

        Args:
            number: of the setting.
            step: rounds of the settings' runs one after the other.
            loss: on the rows that choose.
        """
        trial = self._optuna.trial.Trial(self._study, self._trials()[number]._trial_id)
        with _quiet():
            trial.report(loss, step)
            return bool(trial.should_prune())

    def tell(self, number: int, loss: float | None, *, pruned: bool = False) -> None:
        """Tell what a setting came to; None for one that could not be run or was given up."""
        states = self._optuna.trial.TrialState
        with _quiet():
            if pruned:
                self._study.tell(number, state=states.PRUNED)
            elif loss is None or not math.isfinite(loss):
                self._study.tell(number, state=states.FAIL)
            else:
                self._study.tell(number, loss)

    def _values(self, params: Mapping[str, Any]) -> Values:
        return {axis.key: _restored(axis, params[axis.key]) for axis in self._sweep.axes if axis.key in params}

    def _sampler(self, number: int) -> Any:
        """The sampler of a setting. A fresh one for each, so that a search that goes on does not draw again."""
        samplers, path = self._optuna.samplers, (self._sweep.base.seed, "sweep")
        seed = derive_seed(*path, number) % 2**32
        with _quiet():
            match self._sweep.search:
                case "random":
                    return samplers.RandomSampler(seed=seed)
                case "qmc":  # one sequence, of which the study keeps the place
                    return samplers.QMCSampler(seed=derive_seed(*path) % 2**32, scramble=True)
                case "gp":
                    return samplers.GPSampler(seed=seed)
                case _:
                    return samplers.TPESampler(seed=seed, constant_liar=True)


def _pruner(optuna: ModuleType, sweep: Sweep) -> Any:
    pruners = optuna.pruners
    with _quiet():
        match sweep.pruner:
            case "median":
                return pruners.MedianPruner()
            case "halving":
                return pruners.SuccessiveHalvingPruner()
            case "hyperband":
                return pruners.HyperbandPruner(max_resource=sweep.base.rounds * len(sweep.seeds))
            case _:
                return pruners.NopPruner()


def _distribution(optuna: ModuleType, axis: Axis) -> Any:
    made = optuna.distributions
    if isinstance(axis, Choice):
        return made.CategoricalDistribution([toml_text.shown(value) for value in axis.values])
    if isinstance(axis.low, int):
        return made.IntDistribution(axis.low, axis.high, log=axis.log, step=axis.step or 1)
    return made.FloatDistribution(axis.low, axis.high, log=axis.log, step=axis.step)


def _stored(axis: Axis, value: Any) -> Any:
    """A value as Optuna keeps it: of several named ones the TOML, for it knows neither lists nor tables."""
    return toml_text.shown(value) if isinstance(axis, Choice) else value


def _restored(axis: Axis, value: Any) -> Any:
    if not isinstance(axis, Choice):
        return value
    return axis.values[[toml_text.shown(one) for one in axis.values].index(value)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna calls its Gaussian process and some pruners experimental; its documentation says so as well."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
