"""Labels under way: calculated while whoever asked for them does something else.

A thread waits for the workers.  Each label lies in the spool before it is handed over, so that a kill loses none, and
only whoever asked touches the store.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

from almlip_jax.oracles.base import Label
from almlip_jax.oracles.spool import Reservation, in_spool
from almlip_jax.oracles.store import storage_error
from almlip_jax.oracles.worker import Failure, LabelTask, NoSpace


def label_of(outcome: Any, task: LabelTask, store: Path) -> Label:
    """The label that the outcome of a task is; whatever ended the task makes it a failed one.

    Args:
        outcome: as `Backend.run` gives it.
        task: the task.
        store: path of the label store, for messages.

    Raises:
        StorageError: the task was not begun, for want of a place for its result.
    """
    if isinstance(outcome, NoSpace):
        raise storage_error(store, outcome.error)
    if isinstance(outcome, Failure):
        return Label(task.identity, error=outcome.reason, calls=outcome.calls)
    assert isinstance(outcome, Label)
    return outcome


class Underway:
    """Labels that arrive in a thread of their own; iterating waits for them, and raises what has ended the work.

    Args:
        outcomes: numbers of tasks with their outcomes, as they finish.
        tasks: what was asked for.
        store: path of the label store.
        spool: folder for labels on their way.
    """

    def __init__(self, outcomes: Iterable[tuple[int, Any]], tasks: list[LabelTask], store: Path, spool: Path) -> None:
        self.identities = frozenset(task.identity for task in tasks)
        self._outcomes, self._tasks, self._store, self._spool = outcomes, tasks, store, spool
        self._arrived: queue.SimpleQueue[Label | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._ended = False
        threading.Thread(target=self._work, name="labels", daemon=True).start()

    def __iter__(self) -> Iterator[Label]:
        while not self._ended:
            yield from self._taken(self._arrived.get())
        self._raise_error()

    def arrived(self) -> list[Label]:
        """What has arrived and was not taken yet, without waiting."""
        found: list[Label] = []
        with contextlib.suppress(queue.Empty):
            while not self._ended:
                found += self._taken(self._arrived.get_nowait())
        return found

    def ended(self) -> bool:
        """Whether everything that will arrive was taken.

        Raises:
            InputError: the label source cannot be used, or labels cannot be stored.
        """
        if self._ended:
            self._raise_error()
        return self._ended

    def _taken(self, label: Label | None) -> list[Label]:
        self._ended = label is None
        return [] if label is None else [label]

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            for number, outcome in self._outcomes:
                if isinstance(outcome, Failure) and outcome.stopped:
                    return
                label = label_of(outcome, self._tasks[number], self._store)
                if not in_spool(self._spool, label.identity):  # a worker out of reach of the spool, or one that died
                    self._keep(label, len(self._tasks[number].atoms))
                self._arrived.put(label)
        except CancelledError:
            return  # whoever asked has closed the workers
        except BaseException as error:
            self._error = error
        finally:
            self._arrived.put(None)

    def _keep(self, label: Label, atoms: int) -> None:
        try:
            Reservation(self._spool, label.identity, atoms).hand_over(label)
        except OSError as error:
            raise storage_error(self._store, error) from error
