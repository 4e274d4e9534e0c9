"""The runs of a sweep, one after the other and several at a time, until all are done or the budget is spent."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from apiary.core.errors import UserError
from apiary.core.files import write_atomic
from apiary.core.formatting import loss_text, plural, seconds_text
from simulation.sweep import results, space
from simulation.sweep.definition import Budget, Sweep
from simulation.sweep.results import is_finished, run_name
from simulation.sweep.space import Values
from simulation.sweep.study import Search
from simulation.sweep.workers import Job, Message, Worker, messages

RUNS, BASELINES, PROGRESS = "runs", "baselines", "progress.json"
_HOPELESS: Final = 50  # drawn settings that were refused, from which on a search is given up
Tell = Callable[[str], None]


class Progress:
    """What became of runs that came to no result, and how long the sweep has run; kept in its folder.

    Args:
        folder: of the sweep.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / PROGRESS
        values = json.loads(self._path.read_bytes()) if self._path.exists() else {}
        self.ended: dict[str, dict[str, str]] = values.get("ended", {})  # by name of the run
        self._before, self._began = float(values.get("seconds", 0.0)), time.monotonic()

    @property
    def seconds(self) -> float:
        """How long the sweep has run, in all calls together."""
        return self._before + time.monotonic() - self._began

    def end(self, name: str, state: str, why: str) -> None:
        """Keep why a run came to no result."""
        self.ended[name] = {"state": state, "why": why}
        self.save()

    def save(self) -> None:
        """Write it down."""
        values = {"ended": self.ended, "seconds": round(self.seconds, 1)}
        write_atomic(self._path, json.dumps(values, ensure_ascii=False, indent=1) + "\n")


class Loop:
    """Runs what is left of a sweep.

    State: the settings so far, what runs where, and how many runs have begun; all of it can be read again from the
    folder of the sweep, but for the workers.

    Args:
        sweep: what was asked for.
        folder: of the sweep.
        workers: processes that are there already.
        jobs: runs at a time.
        threads: of each process.
        budget: where it ends.
        tell: receives a line for each run that ends.
    """

    def __init__(
        self,
        sweep: Sweep,
        folder: Path,
        workers: list[Worker],
        jobs: int,
        threads: int,
        budget: Budget,
        tell: Tell,
    ) -> None:
        self.sweep, self.folder, self.budget, self.tell = sweep, folder, budget, tell
        self.progress = Progress(folder)
        self.search = None if sweep.search == "grid" else Search(folder, sweep)
        self.spent = ""  # why no further run begins, where the budget says so
        self._grid = sweep.settings() or []
        self._workers, self._jobs, self._threads = workers, jobs, threads
        self._died: set[str] = set()
        self._besides: list[tuple[int, int]] = []  # number and seed of runs that are none of the sweep's
        (folder / RUNS).mkdir(exist_ok=True)

    @property
    def settings(self) -> list[Values]:
        """The settings so far, by number."""
        return self.search.settings if self.search else self._grid

    def run_besides(self, runs: Sequence[tuple[int, int]]) -> None:
        """Run settings with seeds that are none of the sweep's, each by its number, on top of the budget."""
        self._besides = list(runs)
        if runs:
            self._go()

    def run(self) -> None:
        """Run until nothing is left to do or the budget is spent.

        Raises:
            UserError: the first run is refused, so that none would go.
        """
        for number in self.search.open if self.search else ():
            self._settle(number)
        self._go()

    def _go(self) -> None:
        while True:
            self._fill()
            if not any(worker.job for worker in self._workers):
                return
            for worker, message in messages(self._workers):
                self._handle(worker, message)

    # -- what comes next -----------------------------------------------------------------------------

    def _fill(self) -> None:
        """Give idle processes work, and start processes while there is more work than these."""
        while True:
            idle = next((worker for worker in self._workers if worker.job is None), None)
            if idle is None and len(self._workers) >= self._jobs:
                return
            if sum(worker.job is not None for worker in self._workers) >= self._jobs or (job := self._next()) is None:
                return
            if idle is None:
                idle = Worker(self._threads)
                self._workers.append(idle)
            idle.start(job)

    def _next(self) -> Job | None:
        running = {worker.job.name for worker in self._workers if worker.job}
        while True:
            for number, seed in self._order():
                name = run_name(number, seed)
                if name not in running and self._is_left(number, seed) and self._may_begin(name):
                    return self._job(number, seed)
            if self._besides or not self._draw():
                return None

    def _order(self) -> Iterator[tuple[int, int]]:
        """Number and seed of every run: of a grid seed by seed, so that a spent budget leaves whole comparisons."""
        if self._besides:
            yield from self._besides
        elif self.search:
            yield from ((number, seed) for number in self.search.open for seed in self.sweep.seeds)
        else:
            yield from ((number, seed) for seed in self.sweep.seeds for number in range(len(self._grid)))

    def _is_left(self, number: int, seed: int) -> bool:
        given_up = any(run_name(number, one) in self.progress.ended for one in (*self.sweep.seeds, seed))
        return not given_up and not is_finished(self._place(number, seed))

    def _place(self, number: int, seed: int) -> Path:
        return self.folder / RUNS / run_name(number, seed)

    def _may_begin(self, name: str) -> bool:
        """Whether the budget lets a run begin; one that an earlier call began goes on."""
        runs, minutes = self.budget
        if self._besides:
            return True
        if minutes is not None and self.progress.seconds >= 60 * minutes:
            self.spent = f"--minutes {minutes:g}"
            return False
        if (self.folder / RUNS / name).exists():
            return True
        begun = sum(_seed(path.name) in self.sweep.seeds for path in (self.folder / RUNS).iterdir())
        waiting = sum(not (self.folder / RUNS / w.job.name).exists() for w in self._workers if w.job)
        if runs is not None and begun + waiting >= runs:
            self.spent = f"--runs {runs}"
            return False
        return True

    def _draw(self) -> bool:
        """Whether a search has drawn another setting."""
        if self.search is None:
            return False
        settings = self.search.settings
        if self.sweep.trials is not None and len(settings) >= self.sweep.trials:
            return False
        name = run_name(len(settings), self.sweep.seeds[0])
        if not self._may_begin(name):
            return False
        number = self.search.ask()
        try:
            self.sweep.config(self.search.settings[number], self.sweep.seeds[0])
        except UserError as error:
            self.progress.end(name, "refused", str(error.problems[0]))
            self.search.tell(number, None)
            if sum(one["state"] == "refused" for one in self.progress.ended.values()) >= _HOPELESS:
                raise UserError(f"{_HOPELESS} drawn settings were refused, the last one: {error.problems[0]}") from None
        return True

    def _job(self, number: int, seed: int) -> Job:
        folder = self._place(number, seed)
        config = self.sweep.config(self.settings[number], seed).to_json()
        reports = self.search is not None and self.sweep.pruner != "none" and seed in self.sweep.seeds
        return Job(run_name(number, seed), config, str(folder), str(self.folder / BASELINES), reports=reports)

    # -- what workers tell ---------------------------------------------------------------------------

    def _handle(self, worker: Worker, message: Message) -> None:
        name = message.job.name
        number, seed = int(name[1:].partition("-")[0]), _seed(name)
        if message.kind == "round":
            worker.answer(self._goes_on(number, seed, *message.content))
            return
        if message.kind == "died":
            self._workers.remove(worker)
            worker.stop()
            if name not in self._died:  # once more, with fewer at a time: the memory may have been too small
                self._died.add(name)
                self._jobs = max(1, self._jobs - 1)
                self.tell(
                    f"{name}: its process ended by itself (code {message.content}), perhaps for want of memory; "
                    f"it is tried again, {plural(self._jobs, 'run')} at a time"
                )
                return
        alone = not any(other.job for other in self._workers)
        if message.kind == "refused" and alone and not self._any_finished():
            raise UserError(*message.content)
        if message.kind != "done":
            self.progress.end(name, *_end(message))
        self.tell(self._line(number, seed, message))
        self.progress.save()
        if self.search and seed in self.sweep.seeds:
            self._settle(number)

    def _goes_on(self, number: int, seed: int, round_number: int, loss: float | None) -> bool:
        if self.search is None or loss is None:
            return True
        step = self.sweep.seeds.index(seed) * self.sweep.base.rounds + round_number
        return not self.search.report(number, step, loss)

    def _any_finished(self) -> bool:
        return any(map(is_finished, (self.folder / RUNS).iterdir()))

    def _settle(self, number: int) -> None:
        """Tell the search what a setting came to, once all its runs are done or one of them came to no result."""
        assert self.search is not None
        names = [run_name(number, seed) for seed in self.sweep.seeds]
        if number not in self.search.open or any(w.job and w.job.name in names for w in self._workers):
            return
        ends = [self.progress.ended[name] for name in names if name in self.progress.ended]
        if ends:
            self.search.tell(number, None, pruned=ends[0]["state"] == "pruned")
        elif all(is_finished(self.folder / RUNS / name) for name in names):
            losses = [results.read_run(self.folder / RUNS / name).choosing for name in names]
            self.search.tell(number, sum(losses) / len(losses))

    def _line(self, number: int, seed: int, message: Message) -> str:
        done = sum(map(is_finished, (self.folder / RUNS).iterdir()))
        what = f"{space.words(self.settings[number])}, seed {seed}"
        if message.kind == "done":
            run = results.read_run(self._place(number, seed))
            said = f"loss {loss_text(run.choosing)} on the rows that choose"
        else:
            said = ": ".join(filter(None, _end(message)))
        total = "" if self.search else f" of {len(self._grid) * len(self.sweep.seeds) + len(self._besides)}"
        return f"{plural(done, 'run')}{total} done after {seconds_text(self.progress.seconds)}: {what}: {said}"


def _seed(name: str) -> int:
    return int(name.partition("-seed")[2])


def _end(message: Message) -> tuple[str, str]:
    """The state and the reason of a run that came to no result."""
    if message.kind == "died":
        return "failed", f"its process ended by itself (code {message.content}); was the memory too small?"
    if message.kind == "pruned":
        return "pruned", "given up on the way, far behind the others"
    return message.kind, str(message.content[0] if message.kind == "refused" else message.content)
