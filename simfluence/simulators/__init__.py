"""Simulators: ``fit(runs)``, then ``simulate(curricula, initial_losses)`` without training."""

from __future__ import annotations

from collections.abc import Mapping

from simfluence.errors import InvalidInput, did_you_mean
from simfluence.simulators.attributed import AttributedSimulator
from simfluence.simulators.base import Simulator
from simfluence.simulators.baselines import MeanTrajectorySimulator, PersistenceSimulator
from simfluence.simulators.boosted import BoostedSimulator
from simfluence.simulators.conformal import ConformalSimulator
from simfluence.simulators.featurized import FeaturizedSimulator
from simfluence.simulators.markov.simulators import AdditiveSimulator, LinearSimulator, MultiplicativeSimulator
from simfluence.simulators.tangent.simulator import TangentKernelSimulator

#: Every simulator by its name on the command line; ``ConformalSimulator`` wraps any of them,
#: ``AttributedSimulator`` plays an attributor.
SIMULATORS: Mapping[str, type[Simulator]] = {
    kind.name: kind
    for kind in (
        PersistenceSimulator,
        MeanTrajectorySimulator,
        AdditiveSimulator,
        MultiplicativeSimulator,
        LinearSimulator,
        FeaturizedSimulator,
        BoostedSimulator,
    )
}

#: Simulators that need the task besides the runs.
OF_TASK: Mapping[str, type[Simulator]] = {TangentKernelSimulator.name: TangentKernelSimulator}


def build(name: str, **parameters: object) -> Simulator:
    """An unfitted simulator by name.

    Raises:
        InvalidInput: there is none of that name, or it has no such parameter.

    >>> build("additive", l2=3.0)
    AdditiveSimulator(l2=3.0)
    """
    kinds = {**SIMULATORS, **OF_TASK}
    if name not in kinds:
        raise InvalidInput(f"unknown simulator {name!r}, {did_you_mean(name, kinds)}")
    return kinds[name]().with_parameters(**parameters)


__all__ = [
    "OF_TASK",
    "SIMULATORS",
    "AdditiveSimulator",
    "AttributedSimulator",
    "BoostedSimulator",
    "ConformalSimulator",
    "FeaturizedSimulator",
    "LinearSimulator",
    "MeanTrajectorySimulator",
    "MultiplicativeSimulator",
    "PersistenceSimulator",
    "Simulator",
    "TangentKernelSimulator",
    "build",
]
