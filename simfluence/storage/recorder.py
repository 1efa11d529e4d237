"""``Recorder``: record a training loop of your own as a run, without a task or a model.

An unfinished run is a journal, ``partial/<run>/journal.jsonl``, to which each event is appended. When the loop has
ended, the journal becomes a run file in one atomic write.
"""

from __future__ import annotations

import base64
import contextlib
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, SupportsFloat, runtime_checkable

import numpy as np
import pandas as pd

from simfluence._internal.checked import checked, shown
from simfluence._internal.files import cannot_write
from simfluence._internal.types import Seed
from simfluence._internal.validation import number
from simfluence.errors import InvalidInput, StoreError
from simfluence.examples import Examples
from simfluence.recipe import Recipe
from simfluence.storage.journal import JOURNAL_FILE, damaged_at, events_by_time, journal_entries, journal_line
from simfluence.storage.run_file import RunHeader, RunRows
from simfluence.task import Task, TaskInfo

__all__ = ["Recorder", "Storage"]

#: A killed process loses nothing that it recorded; a power cut loses at most this many seconds.
SECONDS_BETWEEN_SYNCS = 5.0

#: Numbers held in memory at a time while a journal is converted to a run file.
BLOCK_NUMBERS = 2**20

_EVENT_NUMBERS = 32  # the numbers whose memory an event takes besides its batch and its losses
_JOURNAL_FORMAT = 2  # format 1 had a checksum per line, which did not notice missing lines
_MEASURE = "measure."  # prefix of a measure in an event
_LONGEST_NAME = 64
_BEFORE = "before any update"


@runtime_checkable
class Storage(Protocol):
    """The part of a store's interface that a recorder uses; ``RunStore`` implements it."""

    path: Path

    def __contains__(self, run_id: str) -> bool: ...
    def open_recording(self, train: Examples | None, test: Examples | None, task: Task | str | None) -> TaskInfo: ...
    def sides(self) -> tuple[Examples, Examples]: ...
    def claim(self, name: str) -> contextlib.AbstractContextManager[bool]: ...
    def partial(self, name: str) -> Path: ...
    def drop_partial(self, name: str) -> None: ...
    def write_rows(self, about: RunHeader, rows: Iterable[RunRows]) -> None: ...


class Recorder:
    """Context manager that records a training loop of your own as one run; ``RunStore.recorder`` creates it.

    Pass it the training examples of each batch, and the loss of every test example before training, after the last
    step, and after any steps in between. If the block ends without an error, the store has a run like any other, for
    simulators, evaluation and what-ifs (to confirm those by retraining, a ``Task`` is needed).

    Each event is on disk at once. An interrupted loop leaves no run, only its journal, and the store lists it as
    ``unfinished()``; ``resume=k`` continues it from your own checkpoint after k steps. Memory does not grow with the
    length of the run.

    Args:
        store: the store to write the run to.
        run: the run's id, of letters, digits, ".", "_" and "-". The default is a random id, which cannot be resumed.
        train, test: training and test examples, or just their ids (distinct texts or numbers), in any fixed order.
            Only a new store needs them; an existing store must have the same.
        task: the ``Task`` that is trained, if there is one, or a name for a new store.
        recipe: the training recipe, if a ``Recipe`` can express it.
        measures: names of further numbers per test example, recorded along with the losses.
        resume: number of steps to keep of an interrupted recording of this name; 0 starts over.

    Raises:
        InvalidInput: a name, id or number that cannot be used, or an interrupted run without ``resume``.
        StoreError: the store has other examples, or another process is recording this run.

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

    @checked
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
        resume: Seed | None = None,
    ) -> None:
        self.store, self.recipe, self.measures, self.resume = store, recipe, tuple(measures), resume
        self.run = uuid.uuid4().hex[:16] if run is None else _checked_name(run)
        if resume is not None and run is None:
            raise InvalidInput("resume= continues an interrupted recording: pass its name, recorder(run, …)")
        if {"loss", "losses"} & set(self.measures):
            raise InvalidInput("a measure cannot be called 'loss' or 'losses': choose another name for it")
        if len(set(self.measures)) < len(self.measures):
            raise InvalidInput(f"the names of the measures must be distinct, got {list(self.measures)}")
        self.fingerprint = store.open_recording(as_examples(train), as_examples(test), task).fingerprint
        self.train, self.test = store.sides()
        self._index = {name: index for index, name in enumerate(self.train.ids)}
        self._dtype = np.dtype(recipe.dtype if recipe else "float32")
        self._claim = contextlib.ExitStack()
        self._is_open = False
        self._unwritten = b""  # header and first reading, until the first step
        self._checksum = self._end = 0  # of the journal as far as it is written
        self.steps = 0
        self._is_read = self._diverged = self._any_example = False

    def __enter__(self) -> Recorder:
        if self.run in self.store:
            raise InvalidInput(f"{self.store.path} already has a finished run {self.run!r}: choose another name")
        with contextlib.ExitStack() as claim:
            if not claim.enter_context(self.store.claim(self.run)):
                raise StoreError(
                    f"another process or recorder is recording run {self.run!r} of {self.store.path}: "
                    "wait until it has finished, or choose another name"
                )
            self._prepare_journal()
            self._claim = claim.pop_all()
        self._is_open, self._synced = True, time.monotonic()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None and self._is_open:
                self._finish()
        finally:
            self.leave()

    def leave(self) -> None:
        """Stop recording without writing a run. The journal stays, so that the recording can be resumed."""
        if self._is_open and self.steps == 0:  # nothing to resume
            self.store.drop_partial(self.run)
        self._is_open = False
        self._claim.close()

    @checked
    def read(self, losses: Any, measures: Mapping[str, Any] | None = None) -> None:
        """Record the test losses before any update, or after the steps so far.

        Args:
            losses: loss of every test example, ``[test]``. Before any update they must be finite; a run whose later
                losses are NaN or infinite is marked as diverged.
            measures: values of each measure, ``[test]``, by name.

        Raises:
            InvalidInput: not one number per test example, or losses after this step are already recorded.
        """
        if self._is_read:
            raise InvalidInput(f"the losses after {self.steps} steps are already recorded: call read once per step")
        event = self._reading(f"after step {self.steps}" if self.steps else _BEFORE, losses, measures or {})
        self._append(event)
        self._count(event)

    @checked
    def step(
        self,
        batch: Any = None,
        losses: Any = None,
        *,
        rows: Any = None,
        ids: Any = None,
        lr: SupportsFloat | None = None,
        measures: Mapping[str, Any] | None = None,
    ) -> None:
        """Record one update: its batch, its learning rate and the test losses after it.

        An example that is in the batch twice counts twice.

        Args:
            batch: ids (texts) or indices (whole numbers) of the batch's examples, or a mask of the training examples;
                empty for a step without an update.
            losses: loss of every test example after the update, ``[test]``; None if not evaluated.
            rows: the batch as indices. Needed where ids are numbers too, so that a bare number could mean either.
            ids: the batch as ids, texts or numbers.
            lr: learning rate of the update, if it should be recorded.
            measures: values of each measure, ``[test]``, by name; only together with losses.

        Raises:
            InvalidInput: an unknown example, bare numbers that could be ids or indices, losses of the wrong shape, or
                no losses before the first step. Nothing of the step is recorded then.
        """
        if self.steps == 0 and not self._is_read:
            raise InvalidInput("the losses before any update are missing: call read(losses) before the first step")
        if losses is None and measures:
            raise InvalidInput("measures are recorded only together with losses: pass both, or neither")
        place = f"step {self.steps + 1}"
        try:
            event: dict[str, Any] = {"batch": self._indices({"batch": batch, "rows": rows, "ids": ids})}
            if lr is not None:
                event["lr"] = number("lr", _plain(lr))
        except InvalidInput as error:
            raise InvalidInput(f"{place}: {error}") from None
        if losses is not None:
            event |= self._reading(place, losses, measures or {})
        self._append(event)
        self._count(event)

    def _indices(self, passed: Mapping[str, Any]) -> list[int]:
        """Return the indices of a batch, which is passed as ``batch``, ``rows`` or ``ids``; repeated ones stay."""
        given = {name: _listed(name, members) for name, members in passed.items() if members is not None}
        if len(given) != 1:
            raise InvalidInput(f"pass one of batch, rows= and ids=, got {' and '.join(given) or 'none'}")
        ((name, members),) = given.items()
        if not members:  # a step without an update
            return []
        if name != "rows" and all(isinstance(member, str) and member in self._index for member in members):
            return [self._index[member] for member in members]  # ``select`` would look at every example
        return list(map(int, self.train.select(**{"target" if name == "batch" else name: members})))

    def _reading(self, place: str, losses: Any, measures: Mapping[str, Any]) -> dict[str, str]:
        """Return the part of an event that holds the losses and the measures."""
        if set(measures) != set(self.measures):
            raise InvalidInput(
                f"{place}: got measures {list(measures)}, but this recorder expects {list(self.measures)}: "
                "name them all in recorder(measures=…), and pass each of them with the losses"
            )
        rounded = self._rounded(place, "losses", losses)
        infinite = np.flatnonzero(~np.isfinite(rounded))
        if len(infinite) and place == _BEFORE:
            raise InvalidInput(
                f"{place}: the loss of test example {self.test.ids[infinite[0]]!r} is {rounded[infinite[0]]} in "
                f"{self._dtype}, but must be finite: look for missing values in the example and the model"
            )
        values = {_MEASURE + name: self._rounded(place, name, measures[name]) for name in self.measures}
        return {
            name: base64.b64encode(array.tobytes()).decode() for name, array in ({"losses": rounded} | values).items()
        }

    def _rounded(self, place: str, name: str, values: Any) -> np.ndarray:
        """Return one number per test example, ``[test]``, in the precision of the run."""
        array = _as_array(values)
        if array is None or array.shape != (len(self.test),) or array.dtype.kind not in "biuf":
            got = shown(values) if array is None else f"{array.dtype}{list(array.shape)}"
            raise InvalidInput(
                f"{place}: {name}: pass one number for each of the {len(self.test)} test examples, got {got} "
                "(in torch: reduction='none')"
            )
        with np.errstate(over="ignore"):
            return array.astype(self._dtype)

    def _append(self, event: Mapping[str, Any]) -> None:
        if not self._is_open:
            raise InvalidInput("a recorder works only inside its with block: with store.recorder(…) as rec: …")
        line, checksum = journal_line(event, self._checksum)
        content = self._unwritten + line
        if self.steps == 0 and "batch" not in event:  # the journal is created with the first step
            self._unwritten, self._checksum = content, checksum
            return
        try:
            with open(self._journal, "ab") as file:
                file.write(content)
                if time.monotonic() - self._synced > SECONDS_BETWEEN_SYNCS:
                    file.flush()
                    os.fsync(file.fileno())
                    self._synced = time.monotonic()
        except OSError as error:
            with contextlib.suppress(OSError):  # part of the line may be written: nothing of the step is to stay
                os.truncate(self._journal, self._end)
            raise cannot_write(self._journal, error) from error
        self._unwritten, self._checksum, self._end = b"", checksum, self._end + len(content)

    def _count(self, event: Mapping[str, Any]) -> None:
        if "batch" in event:
            self.steps += 1
            self._is_read = False
            self._any_example |= len(event["batch"]) > 0
        if "losses" in event:
            self._is_read = True
            self._diverged |= not np.isfinite(self._unpacked(event["losses"])).all()

    @property
    def _journal(self) -> Path:
        return self.store.partial(self.run) / JOURNAL_FILE

    @property
    def _header(self) -> dict[str, Any]:
        """The journal's first line, which must stay the same when a recording is resumed."""
        return {
            "format": _JOURNAL_FORMAT,
            "fingerprint": self.fingerprint,
            "recipe": self.recipe.canonical() if self.recipe else None,
            "measures": list(self.measures),
        }

    def _prepare_journal(self) -> None:
        """Cut the journal after ``resume`` steps and count its events, or start a new one."""
        self._checksum = self._end = self.steps = 0
        self._is_read = self._diverged = self._any_example = False
        recorded = 0 if self.resume == 0 else self._count_kept()
        if recorded and self.resume is None:
            raise InvalidInput(
                f"run {self.run!r} was interrupted after {recorded} recorded steps: continue from your checkpoint with "
                "resume=STEPS, start over with resume=0, or choose another name"
            )
        if self.resume and self.resume > recorded:
            raise InvalidInput(f"resume={self.resume}, but only {recorded} steps of run {self.run!r} are recorded")
        try:
            if self.resume:
                os.truncate(self._journal, self._end)
            else:
                self._journal.parent.mkdir(parents=True, exist_ok=True)
                self._journal.unlink(missing_ok=True)
                self._unwritten, self._checksum = journal_line(self._header)
                self._end = 0
        except OSError as error:
            raise cannot_write(self._journal, error) from error

    def _count_kept(self) -> int:
        """Count the events of the first ``resume`` steps of the journal; return how many steps it has in all.

        Raises:
            StoreError: the journal is damaged, or was started with other arguments.
        """
        entries = journal_entries(self._journal)
        header = next(entries, None)
        if header is None:
            return 0
        if self.resume and header.event.get("format") != _JOURNAL_FORMAT:
            raise StoreError(f"run {self.run!r} was started by an older version: start over with resume=0")
        if self.resume and header.event != self._header:
            raise StoreError(
                f"run {self.run!r} was started with another recipe or other measures: start over with resume=0"
            )
        recorded, self._checksum, self._end = 0, header.checksum, header.end
        for entry in entries:
            recorded += "batch" in entry.event
            if self.resume and recorded <= self.resume:
                self._count(self._checked_event(entry.event))
                self._checksum, self._end = entry.checksum, entry.end
        return recorded

    def _checked_event(self, event: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return an event of the journal if a recorder can have written it.

        Raises:
            StoreError: it has other parts, or parts of the wrong type or size.
        """
        batch, lr = event.get("batch", []), event.get("lr", 0.0)
        readings = {"losses", *(_MEASURE + name for name in self.measures)}
        fits = (
            set(event) - {"batch", "lr"} in (set(), readings)
            and isinstance(batch, list)
            and all(type(index) is int and 0 <= index < len(self.train) for index in batch)
            and isinstance(lr, int | float)
            and all(self._is_packed(event[name]) for name in readings & set(event))
        )
        if not fits:
            raise damaged_at(self._journal, self._end)
        return event

    def _is_packed(self, text: Any) -> bool:
        try:
            return len(base64.b64decode(text, validate=True)) == len(self.test) * self._dtype.itemsize
        except (TypeError, ValueError):
            return False

    def _finish(self) -> None:
        """Convert the journal to a run."""
        if not self._any_example:
            raise InvalidInput(
                f"run {self.run!r} has no step with an example: call step(batch, losses) after every update"
            )
        if not self._is_read:
            raise InvalidInput(
                f"the losses after the last step ({self.steps}) are missing: pass them to step, or call read(losses) "
                f"at the end. Nothing is lost: recorder({self.run!r}, resume={self.steps}) continues this recording"
            )
        header = RunHeader(self.run, self.fingerprint, len(self.train), self.recipe, self._diverged, engine="recorder")
        self.store.write_rows(header, self._rows())
        self.store.drop_partial(self.run)

    def _rows(self) -> Iterator[RunRows]:
        """Yield the journal's times in blocks of bounded size."""
        start, numbers = 0, 0
        block: list[Mapping[str, Any]] = []
        for event in events_by_time(self._events()):
            block.append(event)
            numbers += len(event.get("batch", [])) + len(self.test) * (1 + len(self.measures)) + _EVENT_NUMBERS
            if numbers >= BLOCK_NUMBERS:
                yield self._block(start, block)
                start, numbers, block = start + len(block), 0, []
        if block:
            yield self._block(start, block)

    def _events(self) -> Iterator[Mapping[str, Any]]:
        """Yield the events of the whole journal.

        Raises:
            StoreError: the journal is not what this recorder has written.
        """
        entries = journal_entries(self._journal)
        last = next(entries, None)
        for entry in entries:
            last = entry
            yield self._checked_event(entry.event)
        if last is None or (last.checksum, last.end) != (self._checksum, self._end):
            raise damaged_at(self._journal, 0 if last is None else last.end)

    def _block(self, start: int, times: Sequence[Mapping[str, Any]]) -> RunRows:
        batches = [np.array(event.get("batch", []), np.int32) for event in times]
        losses, *measures = (
            np.stack([self._unpacked(event.get(name)) for event in times])
            for name in ("losses", *(_MEASURE + name for name in self.measures))
        )
        return RunRows(
            start=start,
            batches=np.concatenate(batches),
            sizes=np.array([len(batch) for batch in batches]),
            rates=np.array([event.get("lr", np.nan) for event in times], np.float64),
            recorded=np.array(["losses" in event for event in times]),
            losses=losses,
            measures=dict(zip(self.measures, measures, strict=True)),
        )

    def _unpacked(self, packed: str | None) -> np.ndarray:
        if packed is None:
            return np.full(len(self.test), np.nan, self._dtype)
        return np.frombuffer(base64.b64decode(packed), self._dtype)


def _listed(name: str, members: Any) -> list[Any]:
    """Return the members of a batch as a list of plain values."""
    members = members.tolist() if hasattr(members, "tolist") else members  # an array, a tensor or a column
    if isinstance(members, str | bytes | Mapping | pd.DataFrame) or not isinstance(members, Iterable):
        raise InvalidInput(
            f"{name} must be a list of examples, such as ['a', 'b'] or [0, 17], got {shown(members)}: "
            "pass a list even for one example"
        )
    plain = [_plain(member) for member in members]
    for member in plain:
        if not isinstance(member, int | str):
            raise InvalidInput(f"{name} must contain ids (texts) or indices (whole numbers), got {shown(member)}")
    return plain


def _plain(value: Any) -> Any:
    """Return the number of an array or a tensor without axes as Python's; other values as they are."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


def _as_array(values: Any) -> np.ndarray | None:
    """Return numbers as an array, or None if they cannot be one."""
    try:
        values = values.detach().cpu() if hasattr(values, "detach") else values  # a tensor
        array = np.asarray(values.float() if str(getattr(values, "dtype", "")) == "torch.bfloat16" else values)
    except (TypeError, ValueError, RuntimeError, AttributeError):  # ragged, sparse, or not numbers
        return None
    return None if np.ma.is_masked(values) else array


def _checked_name(run: str) -> str:
    alphanumeric = run.replace("-", "").replace("_", "").replace(".", "")
    is_plain = alphanumeric.isascii() and alphanumeric.isalnum() and len(run) <= _LONGEST_NAME
    if not is_plain or run.startswith(".") or run.endswith(".lock"):
        raise InvalidInput(
            f"a run's name must be usable as a file name: up to {_LONGEST_NAME} letters, digits, '.', '_' and '-', "
            f"not starting with '.' nor ending in '.lock'; got {run!r}"
        )
    return run


def as_examples(side: Examples | Sequence[Any] | None) -> Examples | None:
    """Return the examples of one side, built from their ids if only ids are passed."""
    if side is None or isinstance(side, Examples):
        return side
    return Examples([_plain(name) for name in side])
