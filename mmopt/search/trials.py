"""Which plan to try next, and what was tried before: an Optuna study in memory, or in a file to go on from.

A trial enters the study when it is finished, in one line of the file: a search may be stopped anywhere. What is
suggested depends on the seed and the trials before alone, so one that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmopt.search.result import Candidate

STUDY, FACTS = "mmopt", "facts"


class Trials:
    """Trials of candidates from a `space`; one of each list in `first` comes first, the rest as suggested.

    Wherever there is a choice of methods, keep ratios or position ids it is the same one. store: a file of an Optuna
    journal, made if it is not there. identity: what the results depend on, name -> text. Raises ImportError without
    Optuna, ValueError for a file of something else or of trials with other identity.
    """

    def __init__(
        self,
        space: Sequence[Candidate],
        first: Sequence[Sequence[Candidate]],
        seed: int,
        store: str | Path | None,
        identity: dict[str, str],
    ):
        try:
            import optuna
            from optuna.storages.journal import JournalFileBackend
        except ModuleNotFoundError as e:
            raise ImportError("a search under a budget of quality needs optuna: pip install 'mmopt[search]'") from e
        self.optuna, self.space, self.first, self.seed = optuna, list(space), list(first), seed
        self.choices: dict[str, list[Any]] = {k: [] for k in Candidate._fields}  # where there is a choice
        for c in space:
            for i, name in enumerate(Candidate._fields):
                if len(values := self._values(c[:i])) > 1:
                    self.choices[name] = values
        with self._quiet():
            if store is None:
                self.study = optuna.create_study(study_name=STUDY)
            else:
                path = Path(store).absolute()
                _mend(path)
                backend = JournalFileBackend(str(path))
                storage = optuna.storages.JournalStorage(backend)
                known = any(name == STUDY for name in optuna.get_all_study_names(storage))
                self.study = (optuna.load_study if known else optuna.create_study)(study_name=STUDY, storage=storage)
        given = self.study.user_attrs.get(FACTS)
        if given is None and not self.study.trials:
            self.study.set_user_attr(FACTS, identity)
        elif given != identity:
            differ = [k for k in identity if not given or given.get(k) != identity[k]]
            raise ValueError(f"{store}: its trials are of another search, with other {' and '.join(differ)}")

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """A study that is made is no news."""
        before = self.optuna.logging.get_verbosity()
        self.optuna.logging.set_verbosity(self.optuna.logging.WARNING)
        try:
            yield
        finally:
            self.optuna.logging.set_verbosity(before)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What was kept of each trial, in order."""
        return [t.user_attrs["row"] for t in self.study.trials]

    def recall(self, name: str) -> Any:
        return self.study.user_attrs.get(name)

    def remember(self, name: str, value: Any) -> None:
        self.study.set_user_attr(name, value)

    def upcoming(self) -> Iterator[Candidate]:
        """The next candidate to try, and those to try instead if it cannot be; none twice, none that was tried."""
        trials = self.study.trials
        chance = random.Random(f"{self.seed}, {len(trials)}")
        rest = chance.sample(self.space, len(self.space))
        known = {Candidate(*t.user_attrs["candidate"]) for t in trials}
        early = len(trials) < len(self.first)
        begin = self.first[len(trials)] if early else [self._suggest(chance.randrange(2**32))]
        yield from (c for c in dict.fromkeys([*begin, *rest]) if c not in known)

    def _suggest(self, seed: int) -> Candidate:
        with self._quiet():
            study = self.optuna.create_study(sampler=self.optuna.samplers.TPESampler(seed=seed))
        study.add_trials(self.study.trials)
        trial, chosen = study.ask(), list[Any]()
        for name in Candidate._fields:
            values = self._values(chosen)
            several = len(values) > 1
            chosen.append(trial.suggest_categorical(name, self.choices[name]) if several else values[0])
        return Candidate(*chosen)

    def _values(self, chosen: Sequence[Any]) -> list[Any]:
        """What the next field can be, if those before it are `chosen`."""
        n = len(chosen)
        return list(dict.fromkeys(c[n] for c in self.space if c[:n] == tuple(chosen)))

    def add(self, candidate: Candidate, row: dict[str, Any], value: float, pruned: bool) -> None:
        """A finished trial. value: the lower the better, of `pruned` ones among themselves."""
        optuna, state = self.optuna, self.optuna.trial.TrialState
        asked = [k for i, k in enumerate(Candidate._fields) if len(self._values(candidate[:i])) > 1]
        trial = optuna.trial.create_trial(
            params={k: getattr(candidate, k) for k in asked},
            distributions={k: optuna.distributions.CategoricalDistribution(self.choices[k]) for k in asked},
            user_attrs={"candidate": list(candidate), "row": row},
            state=state.PRUNED if pruned else state.COMPLETE,
            value=None if pruned else value,
            intermediate_values={0: value} if pruned else None,
        )
        self.study.add_trial(trial)


def _mend(path: Path) -> None:
    """A line that was being written when a search was stopped is cut off. ValueError if the file is something else."""
    if not path.exists() or not path.stat().st_size:
        return
    data = path.read_bytes()
    try:
        ours = "op_code" in json.loads(data.split(b"\n", 1)[0])
    except ValueError:
        ours = False
    if not ours:
        raise ValueError(f"{path}: exists and holds no trials of a search; name another file or remove it")
    if not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
