"""``Recorder``: a training loop of your own, recorded as a run. It needs no task and no model.

A run under way is a journal, ``partial/<run>/journal.jsonl``, to which each event is appended. Only when the loop has
ended does the journal become a run file, whole or not at all.
"""

from __future__ import annotations

import base64
import contextlib
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import numpy as np

from simfluence._internal.files import cannot_write
from simfluence.errors import InvalidInput, StoreError, did_you_mean
from simfluence.examples import Examples
from simfluence.recipe import Recipe
from simfluence.storage.journal import JOURNAL_FILE, events_by_time, journal_events, journal_line
from simfluence.storage.run_file import RunHeader, RunRows
from simfluence.task import Task, TaskInfo

#: What a process has recorded outlives its death at once, and a power cut after so many seconds.
SECONDS_BETWEEN_SYNCS = 5.0

#: Numbers held in memory at a time while a journal becomes a run file.
BLOCK_NUMBERS = 2**22

_LONGEST_NAME = 64


@runtime_checkable
class Storage(Protocol):
    """What a recorder needs of the store that it records into; ``RunStore`` has it."""

    path: Path

    def __contains__(self, run_id: str) -> bool: ...
    def open_recording(self, train: Examples | None, test: Examples | None, task: Task | str | None) -> TaskInfo: ...
    def sides(self) -> tuple[Examples, Examples]: ...
    def claim(self, name: str) -> contextlib.AbstractContextManager[bool]: ...
    def partial(self, name: str) -> Path: ...
    def drop_partial(self, name: str) -> None: ...
    def write_rows(self, about: RunHeader, rows: Iterable[RunRows]) -> None: ...


class Recorder:
    """One run of a training loop of your own, as a context manager; ``RunStore.recorder`` makes it.

    The loop says which training examples were in each batch, and the loss of every test example before training, after
    the last step, and after as many steps between as it cares to evaluate. Where the block ends without an error, the
    store has a run like any other: for simulators, evaluation and what-ifs (confirming those by retraining needs a
    ``Task``).

    What was recorded is on disk at once. A loop that broke off leaves no run but its journal, and the store lists it
    as ``unfinished()``; ``resume=k`` goes on from a checkpoint of yours after k steps. Memory is bounded, however long
    the run.

    Args:
        store: where the run goes.
        run: the run's id, of letters, digits, ".", "_" and "-"; a random one without it, which cannot be gone on with.
        train, test: the examples of both sides, or just their ids, in any fixed order. Needed for a new store alone;
            afterwards they must be the same.
        task: what is trained, if there is a ``Task`` of it, or the name of what a new store is of.
        recipe: how it is trained, if a recipe can say it.
        measures: names of further numbers per test example that are read with every loss.
        resume: number of steps to keep of a recording of this name that broke off; 0 begins anew.

    Raises:
        InvalidInput: a name, id or number that cannot be used, or a broken-off run without ``resume``.
        StoreError: the store is of other examples, or another process is recording this run.

    >>> import tempfile
    >>> from simfluence import RunStore
    >>> store = RunStore(tempfile.mkdtemp())
    >>> with store.recorder("mine", train=["a", "b", "c"], test=["x", "y"]) as rec:
    ...     rec.read([0.7, 0.6])  # before any update
    ...     for batch in [["a", "b"], ["c", "a"]]:
    ...         rec.step(batch, losses=[0.5, 0.4])  # after your update of the model
    >>> store.load()
    Runs(1: train=3, test=2)
    """

    def __init__(
        self,
        store: Storage,
        run: str | None = None,
        *,
        train: Examples | Sequence[Any] | None = None,
        test: Examples | Sequence[Any] | None = None,
        task: Task | str | None = None,
        recipe: Recipe | None = None,
        measures: Sequence[str] = (),
        resume: int | None = None,
    ) -> None:
        self.store, self.recipe, self.measures, self.resume = store, recipe, tuple(measures), resume
        self.run = uuid.uuid4().hex[:16] if run is None else _checked_name(run)
        if resume is not None and run is None:
            raise InvalidInput("resume= goes on with a run that broke off: say which by its name, recorder(run, …)")
        if {"loss", "losses"} & set(self.measures):
            raise InvalidInput("the loss is recorded always: give the measure another name")
        self.fingerprint = store.open_recording(as_examples(train), as_examples(test), task).fingerprint
        self.train, self.test = store.sides()
        self._index = {name: index for index, name in enumerate(self.train.ids)}
        self._dtype = np.dtype(recipe.dtype if recipe else "float32")
        self._claim = contextlib.ExitStack()
        self._under_way = False
        self._unwritten = b""  # header and first reading, until there is a step
        self.steps = 0
        self._is_read = self._diverged = self._any_example = False

    def __enter__(self) -> Recorder:
        if self.run in self.store:
            raise InvalidInput(f"{self.store.path} has a finished run {self.run!r} already: record under another name")
        with contextlib.ExitStack() as claim:
            if not claim.enter_context(self.store.claim(self.run)):
                raise StoreError(
                    f"run {self.run!r} of {self.store.path} is being recorded by another process or recorder"
                )
            self._go_on()
            self._claim = claim.pop_all()
        self._under_way, self._synced = True, time.monotonic()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None and self._under_way:
                self._finish()
        finally:
            self.leave()

    def leave(self) -> None:
        """Record no further. What was recorded stays as a journal, to be gone on with; there is no run of it."""
        if self._under_way and self.steps == 0:  # nothing to go on with
            self.store.drop_partial(self.run)
        self._under_way = False
        self._claim.close()

    def read(self, losses: Any, measures: Mapping[str, Any] | None = None) -> None:
        """The test side at the present time: before any update, or after the steps so far.

        Args:
            losses: of every test example, ``[test]``.
            measures: the same of each measure.

        Raises:
            InvalidInput: not one number per test example, or this time was read before.
        """
        if self._is_read:
            raise InvalidInput(f"the losses after {self.steps} steps are recorded already")
        self._append(self._reading(losses, measures or {}))
        self._is_read = True

    def step(
        self,
        batch: Any,
        losses: Any = None,
        *,
        lr: float | None = None,
        measures: Mapping[str, Any] | None = None,
    ) -> None:
        """One update was made: on these training examples, at this learning rate, with these test losses after it.

        Args:
            batch: ids (texts) or indices (whole numbers) of the batch's examples; empty for a step without an update.
            losses: of every test example, ``[test]``; without them this time is not read.
            lr: the learning rate, if it matters.
            measures: of every test example, beside the losses.

        Raises:
            InvalidInput: an example that is not there, losses of another number of examples, no losses before the
                first step. Nothing of the step is recorded then.
        """
        if self.steps == 0 and not self._is_read:
            raise InvalidInput("the losses before any update are missing: call read(losses) before the first step")
        if losses is None and measures:
            raise InvalidInput("measures without losses: give both, or neither")
        event: dict[str, Any] = {"batch": self._indices(batch)} | ({} if lr is None else {"lr": float(lr)})
        if losses is not None:
            event |= self._reading(losses, measures or {})
        self._append(event)
        self._count(event)

    def _indices(self, batch: Any) -> list[int]:
        """Ids or indices as indices."""
        places = batch.tolist() if hasattr(batch, "tolist") else list(batch)
        return [self._of_id(place) if isinstance(place, str) else self._checked(place) for place in places]

    def _of_id(self, name: str) -> int:
        if name not in self._index:
            raise InvalidInput(f"no training example {name!r}, {did_you_mean(name, self.train.ids[:1000])[:200]}")
        return self._index[name]

    def _checked(self, index: Any) -> int:
        if isinstance(index, bool) or not isinstance(index, int | np.integer) or not 0 <= index < len(self.train):
            last = len(self.train) - 1
            raise InvalidInput(f"a batch holds ids of training examples, or indices from 0 to {last}; got {index!r}")
        return int(index)

    def _reading(self, losses: Any, measures: Mapping[str, Any]) -> dict[str, str]:
        if set(measures) != set(self.measures):
            raise InvalidInput(
                f"measures {sorted(measures)} were given, but {sorted(self.measures)} are recorded: "
                "name them all at recorder(measures=…), and give each with every reading"
            )
        return {name: self._packed(name, values) for name, values in {"losses": losses, **measures}.items()}

    def _packed(self, name: str, values: Any) -> str:
        values = values.detach().cpu() if hasattr(values, "detach") else values  # a tensor
        array = np.asarray(values.float() if str(getattr(values, "dtype", "")) == "torch.bfloat16" else values)
        if array.shape != (len(self.test),) or array.dtype.kind not in "biuf":
            raise InvalidInput(
                f"{name}: give one number for each of the {len(self.test)} test examples, got "
                f"{array.dtype}{list(array.shape)} (in torch: reduction='none')"
            )
        with np.errstate(over="ignore"):
            kept = array.astype(self._dtype)
        if name == "losses":
            self._diverged |= not np.isfinite(kept).all()
        return base64.b64encode(kept.tobytes()).decode()

    def _append(self, event: Mapping[str, Any]) -> None:
        if not self._under_way:
            raise InvalidInput("a recorder records within its block only: with store.recorder(…) as rec: …")
        if self.steps == 0 and "batch" not in event:  # a journal begins with its first step
            self._unwritten += journal_line(event)
            return
        try:
            with open(self._journal, "ab") as file:
                file.write(self._unwritten + journal_line(event))
                if time.monotonic() - self._synced > SECONDS_BETWEEN_SYNCS:
                    file.flush()
                    os.fsync(file.fileno())
                    self._synced = time.monotonic()
        except OSError as error:
            raise cannot_write(self._journal, error) from error
        self._unwritten = b""

    def _count(self, event: Mapping[str, Any]) -> None:
        if "batch" in event:
            self.steps += 1
            self._is_read = False
            self._any_example |= len(event["batch"]) > 0
        self._is_read |= "losses" in event

    @property
    def _journal(self) -> Path:
        return self.store.partial(self.run) / JOURNAL_FILE

    @property
    def _header(self) -> dict[str, Any]:
        """What must be the same where a recording is gone on with."""
        return {
            "fingerprint": self.fingerprint,
            "recipe": self.recipe.canonical() if self.recipe else None,
            "measures": list(self.measures),
        }

    def _go_on(self) -> None:
        """Leave in the journal what is to be kept of it, and count that."""
        header, keep, there = None, 0, 0
        for event, end in journal_events(self._journal):
            if header is None:
                header, keep = event, end
                continue
            there += "batch" in event
            if self.resume and there <= self.resume:
                self._count(event)
                self._diverged |= "losses" in event and not np.isfinite(self._unpacked(event["losses"])).all()
                keep = end
        if there and self.resume is None:
            raise InvalidInput(
                f"run {self.run!r} broke off after {there} recorded steps: go on from a checkpoint of yours with "
                "resume=STEPS, begin anew with resume=0, or record under another name"
            )
        if self.resume and self.resume > there:
            raise InvalidInput(f"resume={self.resume}, but of run {self.run!r} {there} steps are recorded")
        if self.resume and header != self._header:
            raise StoreError(
                f"run {self.run!r} was begun with another recipe or other measures: begin anew with resume=0"
            )
        try:
            if self.resume:
                os.truncate(self._journal, keep)
            else:
                self._journal.parent.mkdir(parents=True, exist_ok=True)
                self._journal.unlink(missing_ok=True)
                self._unwritten = journal_line(self._header)
        except OSError as error:
            raise cannot_write(self._journal, error) from error

    def _finish(self) -> None:
        """The journal becomes a run."""
        if not self._any_example:
            raise InvalidInput(
                f"run {self.run!r} has no step with an example: call step(batch, losses) after every update"
            )
        if not self._is_read:
            raise InvalidInput(
                f"the losses after the last step ({self.steps}) are missing: give them with it, or call read(losses) "
                f"at the end. Nothing is lost: recorder({self.run!r}, resume={self.steps}) goes on from there"
            )
        about = RunHeader(self.run, self.fingerprint, len(self.train), self.recipe, self._diverged, engine="recorder")
        self.store.write_rows(about, self._rows())
        self.store.drop_partial(self.run)

    def _rows(self) -> Iterator[RunRows]:
        events = (event for event, _ in islice(journal_events(self._journal), 1, None))
        size = max(1, BLOCK_NUMBERS // (len(self.test) * (1 + len(self.measures))))
        times, start = events_by_time(events), 0
        while block := list(islice(times, size)):
            yield self._block(start, block)
            start += len(block)

    def _block(self, start: int, times: Sequence[Mapping[str, Any]]) -> RunRows:
        batches = [np.array(event.get("batch", []), np.int32) for event in times]
        readings = {
            name: np.stack([self._unpacked(event.get(name)) for event in times]) for name in ("losses", *self.measures)
        }
        return RunRows(
            start=start,
            batches=np.concatenate(batches),
            sizes=np.array([len(batch) for batch in batches]),
            rates=np.array([event.get("lr", np.nan) for event in times], np.float64),
            recorded=np.array(["losses" in event for event in times]),
            losses=readings.pop("losses"),
            measures=readings,
        )

    def _unpacked(self, packed: str | None) -> np.ndarray:
        if packed is None:
            return np.full(len(self.test), np.nan, self._dtype)
        return np.frombuffer(base64.b64decode(packed), self._dtype)


def _checked_name(run: str) -> str:
    plain = run.replace("-", "").replace("_", "").replace(".", "")
    if not (plain.isascii() and plain.isalnum() and len(run) <= _LONGEST_NAME) or run.startswith("."):
        raise InvalidInput(
            f"a run's name is a file's: up to {_LONGEST_NAME} letters, digits, '.', '_' and '-', got {run!r}"
        )
    return run


def as_examples(side: Examples | Sequence[Any] | None) -> Examples | None:
    """Examples, or ids in their order, as examples."""
    return side if side is None or isinstance(side, Examples) else Examples(list(side))
