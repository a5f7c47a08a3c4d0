"""The campaign: train, evaluate, explore, select, label, round after round, until a stopping rule holds.

`run_campaign` begins one in a new directory, `resume_campaign` goes on after a stop of any kind: a kill, an error, a
spent budget that has been enlarged, labels that had to be made elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from almlip_jax.campaign import bookkeeping, continuity, stopping
from almlip_jax.campaign.beginning import with_beginning
from almlip_jax.campaign.checks import check_campaign, check_correction_of
from almlip_jax.campaign.config import ExperimentConfig
from almlip_jax.campaign.consistency import check_columns
from almlip_jax.campaign.inputs import Inputs
from almlip_jax.campaign.latest import point_to
from almlip_jax.campaign.preparation import check_target_labels
from almlip_jax.campaign.report import Drawn, write_report
from almlip_jax.campaign.round import Budget
from almlip_jax.campaign.rounds import Rounds
from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.campaign.stage_clock import StageClock, TickingProgress
from almlip_jax.campaign.stages import Results
from almlip_jax.campaign.state import CampaignState, FinalRecord, Stage, read_state, write_state
from almlip_jax.campaign.teaching import Teacher
from almlip_jax.config import config_text
from almlip_jax.errors import CapacityError, InputError, LabelError
from almlip_jax.files import plain, write_text
from almlip_jax.kinds import check_user_code
from almlip_jax.oracles import Labeller, LabelStore, PendingLabels
from almlip_jax.progress import Progress, SilentProgress
from almlip_jax.run_log import LoggedProgress, logged
from almlip_jax.settings import from_here
from almlip_jax.structures.io import read_structures
from almlip_jax.work_directory import write_versions

Work = Callable[[int], Results]
"""A stage: does its work for a round, writes its files, and returns fields of the round's record."""


@dataclass(frozen=True)
class Outcome:
    """How a campaign, or a part of it, ended.

    Attributes:
        run_dir: its directory.
        finished: whether a stopping rule held; otherwise it waits for labels made elsewhere.
        converged: whether the rule says that the potential is good enough.
        rule: name of the rule, or None.
        reason: why it ended, or what it waits for; one sentence.
        round: number of the last round, from 0.
        labels: label-source calls, without those of the test set.
        potential: folder of the final potential, or of the last that was trained, or None.
        errors: test errors of the final potential, or of the last round that was evaluated, ``<metric>_<group>``;
            empty without a test set.
        costs: of a campaign with a teacher, ``label_seconds``, ``teacher_calls`` and ``teacher_seconds``.
    """

    run_dir: Path
    finished: bool
    converged: bool
    rule: str | None
    reason: str
    round: int
    labels: int
    potential: Path | None
    errors: Mapping[str, float] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)


class Campaign:
    """A campaign at work: its state, and the protocol that moves it on.

    Args:
        config: the resolved config.
        run: its directory, which this process has locked.
        progress: tells the user.
    """

    def __init__(self, config: ExperimentConfig, run: RunDirectory, progress: Progress) -> None:
        self.config = config
        self.run = run
        self.clock = StageClock(run.stage_seconds)
        self.progress: Progress = TickingProgress(progress, self.clock)
        self.state = read_state(run) if run.state.exists() else _first_state(config)
        self.teacher: Teacher | None = None
        self.drawn = Drawn()
        self.with_changes = False  # whether the config is another one than in the last session
        self.store = LabelStore(run.labels)
        try:
            self.labeller = Labeller(config.oracle, self.store, config.executor)
            if config.teacher is not None:
                self.teacher = Teacher.open(config.teacher, run)
        except BaseException:  # for example, the label source is not installed: whoever tries again needs the store
            self.store.close()
            raise
        self.rounds = Rounds(config, run, self.labeller, self.state.measured, self.progress, self.teacher)

    def close(self) -> None:
        """Ends the workers of the label sources and closes the stores."""
        self.labeller.close()
        self.store.close()
        if self.teacher is not None:
            self.teacher.close()

    def take_stock(self) -> None:
        """Remembers what has to stay, and holds the label store against the calls that were counted."""
        if not self.state.settled:
            self.state = self.state.model_copy(update={"settled": continuity.settled(self.config)})
        before, self.state = self.state, continuity.with_config(self.run, self.state)
        self.with_changes = bool(before.files) and before.files != self.state.files
        self.state, said = bookkeeping.take_stock(self.store, self.run, self.config.name, self.state)
        if said:
            self.progress.message(said)
        self.save(self.state.model_copy(update=self.calls()))
        self.store.watch(self.note_calls)  # not before: rows that are restored pay for no call that is lost
        if self.teacher is not None:
            self.teacher.watch(self.note_calls)
        self.point_to_potential()

    def point_to_potential(self) -> None:
        """Makes ``potential`` in the run directory lead to the newest potential."""
        trained = self.trained()
        if trained:
            point_to(self.run, trained[-1])

    def trained(self) -> list[Path]:
        """Folders of the potentials that are there, the newest last."""
        found = [entry.potential for entry in self.run.rounds() if (entry.potential / "potential.json").exists()]
        return found if self.state.final is None else [*found, self.run.final.potential]

    def follow_protocol(self) -> Outcome:
        """Goes on from where the state stands; what is done already is passed over."""
        if not self.state.finished:
            self.go_round()
        if self.lacks_final("evaluate"):
            self.report()
            self.finish()
        self.report()
        return self.outcome()

    def go_round(self) -> None:
        """Goes round from where the state stands until a stopping rule holds."""
        rounds = self.rounds
        if self.state.under_way is not None:
            with self.noting_errors():
                rounds.begin_labels(self.state.under_way)
        self.do(Stage.TEACHER, rounds.make_teacher_frames)
        self.do(Stage.PRETRAIN, rounds.pretrain)
        self.do(Stage.INITIAL, rounds.make_initial_set)
        self.do(Stage.TEST, rounds.make_test_set)
        while True:
            self.begin_round()
            self.do(Stage.TRAIN, lambda index: {**rounds.train(index), **self.calls(trained_on=True)})
            self.do(Stage.EVALUATE, rounds.evaluate)
            if self.ends():
                break
            self.do(Stage.EXPLORE, lambda index: rounds.explore(index, self.budget(), self.state.under_way))
            if self.ends():
                break
            self.do(Stage.SELECT, lambda index: rounds.select(index, self.budget(), self.state.under_way))
            if self.ends():
                break
            self.label()
            self.report()

    def do(self, stage: Stage, work: Work) -> None:
        """Does a stage if it is next, and then moves the state on: first the files, then the state."""
        if self.state.stage is not stage:
            return
        results, seconds = self.results_of(work, stage)
        update: dict[str, Any] = {}
        if stage is Stage.EXPLORE:
            results = {**results, "explored_anew": continuity.explores_otherwise(self.config, self.state)}
            update = {"explored_with": continuity.exploration_of(self.config)}
        following = self.state.after(results, seconds=seconds, measured=self.rounds.measured)
        self.move_on(following.model_copy(update=update))
        if stage is Stage.TRAIN:
            self.point_to_potential()

    def label(self) -> None:
        """Labels the batch, if that is next, or begins to; what is under way from the round before is waited for."""
        if self.state.stage is not Stage.LABEL:
            return
        index, before, asks = self.state.round, self.state.under_way, not self.state.closing
        if not asks:
            self.run.round(index).batch.unlink(missing_ok=True)
        ahead = asks and self.goes_ahead()
        due = [*([] if before is None else [before]), *([index] if asks and not ahead else [])]
        failed: dict[int, int] = {}
        insist = self.state.tried_again != index

        def work(index: int) -> Results:
            failed.update(self.rounds.label(index, due, insist=insist))
            if ahead:
                self.rounds.begin_labels(index)
            return {}

        _, seconds = self.results_of(work, Stage.LABEL)
        following = self.state.after({}, seconds=seconds, measured=self.rounds.measured)
        self.move_on(following.labelled(failed, index if ahead and self.rounds.identities(index) else None))

    def goes_ahead(self) -> bool:
        """Whether the next round need not wait for the labels of this one: it is to, and will choose structures too."""
        if not self.config.campaign.overlap or self.state.round + 1 >= self.config.stopping.max_rounds:
            return False
        left = self.labels_left(self.state.under_way, self.state.round)
        return left is None or left > 0

    def move_on(self, following: CampaignState) -> None:
        """Makes durable that a stage is done, whose files are there."""
        files = continuity.digests_after(self.state.stage, self.state.round, self.run, self.state.files)
        self.save(following.model_copy(update={"files": files, **self.calls()}))
        self.clock.forget()
        with self.noting_errors():
            self.labeller.land()

    def finish(self) -> None:
        """Trains and evaluates the final potential where the config asks for one that is not there yet."""
        if self.lacks_final("train"):
            self.progress.round(self.state.round, self.state.round + 1)  # no other round comes
            steps = self.config.training.final_steps or 0
            _, seconds = self.results_of(self.rounds.train_final, f"train the final potential for {steps} steps")
            self.save_final(FinalRecord(round=self.state.round, steps=steps, seconds={"train": seconds}))
            self.point_to_potential()
        if self.lacks_final("evaluate"):
            results, seconds = self.results_of(self.rounds.evaluate_final, "evaluate the final potential")
            assert self.state.final is not None
            times = {**self.state.final.seconds, "evaluate": seconds}
            self.save_final(self.state.final.model_copy(update={**results, "seconds": times}))

    def lacks_final(self, stage: str) -> bool:
        """Whether a final potential is asked for that has not come through ``train`` or ``evaluate`` yet."""
        wanted, final = self.config.training.final_steps, self.state.final
        if wanted is None:
            return False
        return final is None or final.steps != wanted or stage not in final.seconds

    def save_final(self, final: FinalRecord) -> None:
        """Makes durable how far the final potential has come."""
        self.save(self.state.model_copy(update={"final": final, "measured": plain(self.rounds.measured)}))
        self.clock.forget()

    def results_of(self, work: Work, stage: str) -> tuple[Mapping[str, Any], float]:
        """What a stage found out, and the seconds it took in all sessions; an error is kept for the status."""
        with self.noting_errors(), self.clock.stage(f"round {self.state.round}, {stage}"):
            results = work(self.state.round)
            return results, self.clock.seconds

    @contextlib.contextmanager
    def noting_errors(self) -> Iterator[None]:
        """Within the block errors are kept for the status."""
        try:
            with _disk_errors():
                yield
        except (InputError, LabelError, CapacityError) as error:
            self.note_error(error)
            raise

    def begin_round(self) -> None:
        """Tells the user."""
        self.progress.round(self.state.round, self.config.stopping.max_rounds + 1)

    def ends(self) -> bool:
        """Whether a stopping rule holds; if so, it goes into the state.

        Labels that are under way come first: they are waited for and trained on, and then the rules are asked again.
        """
        verdict = None if self.state.closing else stopping.decide(self.config.stopping, self.state.history)
        if verdict is None:
            return False
        if self.state.under_way is not None:
            self.progress.message(f"{verdict.reason} Labels that are under way are trained on first.")
            files = continuity.without_batch(self.run, self.state.round, self.state.files)
            self.save(self.state.wound_up().model_copy(update={"files": files}))
            return False
        ending = {"rule": verdict.rule, "converged": verdict.converged, "reason": verdict.reason}
        self.save(self.state.model_copy(update={"finished": True, **ending}))
        return True

    def reopen(self) -> bool:
        """Prepares a campaign that stood still to go on, and says whether anything is left to do.

        One that has finished goes round again only if the stopping rules changed, or if a rule that judges an
        exploration ended it, and another exploration is asked for: its last round then explores once more.
        """
        if self.state.retry:
            self.store.reopen_failed()
            if self.teacher is not None:
                self.teacher.reopen_failed()
            again = {"tried_again": self.state.round} if self.state.stage is Stage.LABEL else {}
            self.save(self.state.model_copy(update={"retry": False, "reason": None, **again}))
        if not self.state.finished:
            return True
        state, goes_on = self.state, not self.ends()
        if not goes_on and self.state.rule in stopping.OF_EXPLORATION and self.state.stage is Stage.SELECT:
            goes_on = continuity.explores_otherwise(self.config, self.state)
            state = self.state.before_exploration() if goes_on else state
        if goes_on:
            unfinished = {"finished": False, "converged": False, "rule": None, "reason": None, "final": None}
            self.save(state.model_copy(update=unfinished))
        elif self.with_changes and not self.lacks_final("evaluate"):
            self.progress.message(f"the campaign had ended, and {self.state.rule} still holds: nothing is left to do.")
        return goes_on or self.lacks_final("evaluate")

    def note_error(self, error: Exception) -> None:
        """Keeps for the status why the campaign stands still; labels that failed are tried again when it goes on."""
        with contextlib.suppress(InputError):  # nothing can be written where the disk is full
            retry = isinstance(error, LabelError)
            update = {"reason": str(error), "retry": retry, **self.calls()}
            self.save(self.state.model_copy(update=update))

    def calls(self, *, trained_on: bool = False) -> dict[str, int | float]:
        """Fields of the state and of rounds that count the calls of the label source, those for the test set apart.

        Where there is a teacher, also its calls, and what both have cost.

        Args:
            trained_on: leaves out the calls for labels that are under way, whether they have arrived or not.
        """
        without = self.rounds.identities(self.state.under_way) if trained_on else frozenset[str]()
        counted: dict[str, int | float] = {
            "labels": self.store.count_calls(without=without) + self.state.lost_calls,
            "test_calls": self.store.count_test_calls() + self.state.lost_test_calls,
        }
        if self.teacher is None:
            return counted
        spent = self.store.count_seconds(without=without)
        known = self.state.history[-1] if without else self.state
        return counted | {
            "label_seconds": max(spent, known.label_seconds or 0.0),
            "teacher_calls": max(self.teacher.calls, self.state.teacher_calls or 0),
            "teacher_seconds": max(self.teacher.seconds, self.state.teacher_seconds or 0.0),
        }

    def budget(self) -> Budget:
        """What may be labelled in this round."""
        return Budget(self.config.selection.batch, self.labels_left(self.state.under_way))

    def labels_left(self, *asking: int | None) -> int | None:
        """What is left of the label budget; None where there is no limit.

        Args:
            asking: rounds whose labels may be under way, each of which counts as one call, whatever has arrived.
        """
        most = self.config.stopping.max_labels
        if most is None:
            return None
        asked = frozenset[str]().union(*map(self.rounds.identities, asking))
        return most - self.store.count_calls(without=asked) - self.state.lost_calls - len(asked)

    def note_calls(self) -> None:
        """Makes durable, outside the store, how many calls were made: should the store be removed, they still count."""
        state = self.state.model_copy(update=self.calls())
        if state != self.state:
            self.save(state)

    def save(self, state: CampaignState) -> None:
        """Makes a new state durable."""
        self.state = state
        write_state(self.run, state)

    def report(self) -> None:
        """Writes the report; one that fails is reported to the user, and costs no labels."""
        try:
            write_report(self.run.path, self.drawn)
        except Exception as error:  # a figure must not end a campaign that took days
            self.progress.message(f"the report could not be written ({type(error).__name__}: {error}).")

    def outcome(self) -> Outcome:
        """How things stand."""
        errors = [record.errors for record in self.state.history if record.errors]
        if self.state.final is not None:
            errors = [self.state.final.errors]
        trained = self.trained()
        return Outcome(
            run_dir=self.run.path,
            finished=self.state.finished,
            converged=self.state.converged,
            rule=self.state.rule,
            reason=self.state.reason or "",
            round=self.state.round,
            labels=self.state.labels,
            potential=trained[-1] if trained else None,
            errors=dict(errors[-1]) if errors else {},
            costs=self.state.costs,
        )


def _first_state(config: ExperimentConfig) -> CampaignState:
    """Where a campaign begins."""
    return CampaignState() if config.teacher is None else CampaignState(stage=Stage.TEACHER)


def run_campaign(config: ExperimentConfig, run_dir: Path, *, progress: Progress | None = None) -> Outcome:
    """Runs a whole campaign in a new directory.

    Args:
        config: the config, with paths that hold from the working directory.
        run_dir: its directory; made where it does not exist, and must not hold a campaign.
        progress: tells the user; nothing is told by default.

    Raises:
        InputError: something in the config, an input file or the run directory cannot be used, or the disk is full;
            what is done is kept, and `resume_campaign` goes on.
        LabelError: no structure of a batch could be labelled.
    """
    run = RunDirectory(run_dir)
    with run.lock():
        if run.state.exists():
            raise InputError(f"{run.path} holds a campaign already; resume it, or choose another run directory.")
        with logged(progress or SilentProgress(), run.log) as told:
            config = with_beginning(from_here(config))
            check_campaign(config, told.message)
            write_text(run.config, config_text(config))
            return _carry_on(config, run, told)


def resume_campaign(
    config: ExperimentConfig, run_dir: Path, *, progress: Progress | None = None, accept_changes: bool = False
) -> Outcome:
    """Goes on with a campaign: after a kill with what it was doing, after its end if larger limits allow more.

    Args:
        config: that of the run directory, or one with other limits, trainings, exploration or selection, which then
            replaces it there; what earlier rounds were made of has to stay.
        run_dir: the directory of the campaign.
        progress: tells the user; nothing is told by default.
        accept_changes: goes on also with another label source, and with files that were edited by hand.

    Raises:
        InputError: there is no campaign, the config or an edit by hand changes what has to stay, or as for
            `run_campaign`.
        LabelError: no structure of a batch could be labelled.
    """
    run = RunDirectory(run_dir).require()
    config = from_here(config)
    with run.lock(), logged(progress or SilentProgress(), run.log) as tell:
        config = with_beginning(config)
        _check_change(config, run, tell, accept=accept_changes)
        write_text(run.config, config_text(config))
        return _carry_on(config, run, tell)


def finish_campaign(config: ExperimentConfig, run_dir: Path, *, progress: Progress | None = None) -> CampaignState:
    """What a campaign came to: runs it, goes on with one that was interrupted, or leaves a finished one as it is.

    For scripts that compare campaigns, and may be interrupted and called again.  One that ended at fewer rounds or
    labels than the config now allows goes on.

    Args:
        config: as for `run_campaign`; other than at the time of a finished campaign, it changes limits at most.
        run_dir: the directory of the campaign.
        progress: tells the user; nothing is told by default.

    Returns:
        its state; `CampaignState.history` has the rounds.

    Raises:
        InputError: as for `run_campaign` and `resume_campaign`.
        LabelError: no structure of a batch could be labelled.
    """
    run = RunDirectory(run_dir)
    state = read_state(run) if run.state.exists() else None
    limits = {"max_rounds": ("round", config.stopping.max_rounds), "max_labels": ("labels", config.stopping.max_labels)}
    if state is not None and state.finished:
        if state.rule not in limits:
            return state
        reached, allowed = limits[state.rule]
        if allowed is not None and allowed <= getattr(state, reached):
            return state
    (run_campaign if state is None else resume_campaign)(config, run_dir, progress=progress)
    return read_state(run)


def _carry_on(config: ExperimentConfig, run: RunDirectory, progress: LoggedProgress) -> Outcome:
    with jax.enable_x64(config.precision == "float64"):
        if said := write_versions(run):
            progress.message(said)
        outcome = _work(Campaign(config, run, progress))
    progress.note(f"{'finished' if outcome.finished else 'not finished'}: {outcome.reason or '-'}")
    return outcome


def _work(campaign: Campaign) -> Outcome:
    progress = campaign.progress
    try:
        campaign.take_stock()
        for record in campaign.state.history:
            progress.expect(record.seconds)
        if not campaign.reopen():
            return campaign.outcome()
        return campaign.follow_protocol()
    except PendingLabels as pending:
        campaign.save(campaign.state.model_copy(update={"reason": str(pending), **campaign.calls()}))
        return campaign.outcome()
    finally:
        campaign.close()


def _check_change(config: ExperimentConfig, run: RunDirectory, progress: Progress, *, accept: bool) -> None:
    """Refuses another config, or files edited by hand, where the rounds so far would not fit to them."""
    state = read_state(run)
    note = continuity.check_settings(config, run, state, accept=accept)
    if accept:
        files, kept = continuity.fresh_digests(run, state), continuity.settled(config)
        state = state.model_copy(update={"files": files, "settled": kept})
    else:
        continuity.check_files(run, state)
        if continuity.config_edited(run, state):
            progress.message(f"{run.config} is not what the campaign last ran with; its settings hold from now on.")
    if state.stage is Stage.TEACHER:  # which may still be another one
        check_correction_of(config, Inputs(config, run))
        state = state.model_copy(update={"settled": {**state.settled, **continuity.taught_by(config)}})
    if note is not None:
        progress.message(note)
        state = state.model_copy(update={"settled": continuity.settled(config)})
    check_user_code(config)
    check_columns(config.selection.selector, config.selection.batch, "selection.selector")
    if run.test.exists():
        check_target_labels(config.stopping.target_error, read_structures(run.test))
    write_state(run, state)


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """Turns a full disk into a sentence, whichever library noticed it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(error) or "disk is full" in str(error):
            raise InputError("the disk is full; free some space and resume the run.") from error
        raise
