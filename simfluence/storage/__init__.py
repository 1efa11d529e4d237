"""Runs on disk: the store, its files, and recordings under way."""

from simfluence.storage.recorder import Recorder
from simfluence.storage.store import RunStore

__all__ = ["Recorder", "RunStore"]
