"""Recording of training runs: every test example's loss before training and after every step."""

from simfluence.recording.checkpoints import Checkpoint
from simfluence.recording.estimate import Estimate, break_even, estimate
from simfluence.recording.observe import Observe
from simfluence.recording.replay import follow, replay, trained_model
from simfluence.recording.session import record, run_id

__all__ = [
    "Checkpoint",
    "Estimate",
    "Observe",
    "break_even",
    "estimate",
    "follow",
    "record",
    "replay",
    "run_id",
    "trained_model",
]
