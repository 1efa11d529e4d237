"""Runs on disk: the store, its files, and unfinished recordings."""

from simfluence.storage.recorder import Recorder
from simfluence.storage.store import RunStore

__all__ = ["Recorder", "RunStore"]
