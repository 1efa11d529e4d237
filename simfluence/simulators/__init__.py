"""Simulators: ``fit(runs)``, then ``simulate(curricula, initial_losses)`` without training."""

from __future__ import annotations

from simfluence._internal.checked import checked
from simfluence.errors import InvalidInput, did_you_mean
from simfluence.simulators.attributed import AttributedSimulator
from simfluence.simulators.base import Simulator
from simfluence.simulators.baselines import MeanTrajectorySimulator, PersistenceSimulator
from simfluence.simulators.best import BestSimulator
from simfluence.simulators.boosted import BoostedSimulator
from simfluence.simulators.checks import check_simulator
from simfluence.simulators.conformal import ConformalSimulator
from simfluence.simulators.featurized import FeaturizedSimulator
from simfluence.simulators.markov.simulators import AdditiveSimulator, LinearSimulator, MultiplicativeSimulator
from simfluence.simulators.registry import SIMULATORS
from simfluence.simulators.response.simulator import ResponseSimulator
from simfluence.simulators.tangent.simulator import TangentKernelSimulator


@checked
def build(name: str, **parameters: object) -> Simulator:
    """Build an unfitted simulator from its name.

    Args:
        name: name of a simulator in ``SIMULATORS``.
        parameters: its parameters, by default those of the class.

    Raises:
        InvalidInput: no simulator has that name, or it has no such parameter.

    >>> build("additive", l2=3.0)
    AdditiveSimulator(l2=3.0)
    """
    if name not in SIMULATORS:
        raise InvalidInput(f"unknown simulator {name!r}, {did_you_mean(name, SIMULATORS)}")
    simulator: Simulator = SIMULATORS[name]()
    return simulator.with_parameters(**parameters)


__all__ = [
    "SIMULATORS",
    "AdditiveSimulator",
    "AttributedSimulator",
    "BestSimulator",
    "BoostedSimulator",
    "ConformalSimulator",
    "FeaturizedSimulator",
    "LinearSimulator",
    "MeanTrajectorySimulator",
    "MultiplicativeSimulator",
    "PersistenceSimulator",
    "ResponseSimulator",
    "Simulator",
    "TangentKernelSimulator",
    "build",
    "check_simulator",
]
