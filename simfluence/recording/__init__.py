"""Training runs, recorded: every test example's loss before training and after every step."""

from simfluence.recording.checkpoints import Checkpoint
from simfluence.recording.record import record, run_id

__all__ = ["Checkpoint", "record", "run_id"]
