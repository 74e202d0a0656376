"""Search of an ablation's space by Optuna (arXiv 1907.10902), on validation; the extra ``search``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from generative_recommenders.commands.ablation.plan import Ablation, Cell, Run
from generative_recommenders.commands.ablation.records import best_validation, summary
from generative_recommenders.config.fields import check_sizes
from generative_recommenders.data.preparation.folder import write_text
from generative_recommenders.errors import UserError, first_line, not_installed

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

PARAMETERS = "parameters.json"


class Search:
    """Trials of a search, of which each is a cell with one run; what was tried before is read from the folders.

    trials: how many there shall be. UserError without Optuna, without a space, and in protocol "paper", which has no
    validation.
    """

    def __init__(self, ablation: Ablation, trials: int) -> None:
        try:
            import optuna
        except ImportError as error:
            raise not_installed("optuna", "search") from error
        space = ablation.settings.search
        if not space:
            raise UserError(f"{ablation.file} names no space: give ablation.search")
        if ablation.base.data.protocol == "paper":
            raise UserError(f"{ablation.file}: a search needs validation targets, and protocol 'paper' has none")
        self.ablation, self.trials = ablation, trials
        self.space = {name: distribution(name, given, ablation.file) for name, given in space.items()}
        self.known: dict[str, dict[str, Any]] = {}
        for path in sorted(ablation.out.glob(f"trial-*/{PARAMETERS}")):
            if (values := _values(path, self.space)) is None:
                raise UserError(
                    f"{path.parent} is of another space than that of {ablation.file}: give another folder of runs"
                )
            self.known[path.parent.name] = values
        self.asked: dict[str, Any] = {}
        self.refused: dict[str, str] = {}
        """Trials whose settings cannot be, with the line that says why."""
        self._failed = optuna.trial.TrialState.FAIL
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # A sampler that begins anew must not suggest again what it did before.
        sampler = optuna.samplers.TPESampler(seed=ablation.base.schedule.random_seed + len(self.known))
        self.study = optuna.create_study(direction="maximize", sampler=sampler)

    def runs(self) -> Iterator[Run]:
        """A run a trial: those that were begun first, then what the study suggests when it is asked."""
        for number in range(self.trials):
            name = f"trial-{number:03d}"
            if name in self.known:
                self.study.enqueue_trial(self.known[name])
            trial = self.study.ask(self.space)
            # values of a choice are text already
            bindings = (f"{each} = {v if isinstance(v, str) else repr(v)}" for each, v in trial.params.items())
            write_text(self.ablation.out / name / PARAMETERS, json.dumps(trial.params) + "\n")
            try:
                run = self.ablation.run(Cell(name, tuple(bindings)), self.ablation.base.schedule.random_seed)
            except UserError as error:
                self.refused[name] = str(error)
                self.study.tell(trial, state=self._failed)
                continue
            self.asked[name] = trial
            yield run

    def tell(self, run: Run, failure: str | None) -> None:
        """The study learns of a trial that is done."""
        trial = self.asked.pop(run.cell.name)
        value = None if failure is not None else best_validation(summary(run), self.ablation.settings.metric)
        if value is None:
            self.study.tell(trial, state=self._failed)
        else:
            self.study.tell(trial, value)


def _values(path: Path, space: Mapping[str, BaseDistribution]) -> dict[str, Any] | None:
    """The values of a trial by its file; None where they are of other settings than the space, of choices that are
    gone, or no values."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for name, value in values.items():
            space[name].to_internal_repr(value)
    except (ValueError, KeyError, AttributeError):
        return None
    return values if values.keys() == space.keys() else None


def distribution(name: str, given: Any, file: Path) -> BaseDistribution:
    """``["log", low, high]``, ``["uniform", low, high]`` (floats), ``["int", low, high]`` (of whole numbers) or
    ``["choice", value, ...]``."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    wrong = UserError(
        f"{file}: ablation.search[{name!r}] is {given!r}: give ['log', low, high], ['uniform', low, high], "
        "['int', low, high] or ['choice', value, value, ...]"
    )
    try:
        match given:
            case ["choice", _, *_]:
                return CategoricalDistribution([repr(value) for value in given[1:]])
            case [_, bool(), _] | [_, _, bool()]:  # which Python counts as whole numbers
                raise wrong
            case ["int", int(low), int(high)]:
                check_sizes([low, high])
                return IntDistribution(low, high)
            case ["log" | "uniform" as kind, int() | float() as low, int() | float() as high]:
                check_sizes([low, high])
                return FloatDistribution(low, high, log=kind == "log")
            case _:
                raise wrong
    except (ValueError, TypeError) as error:
        raise UserError(f"{wrong} ({first_line(error)})") from error
