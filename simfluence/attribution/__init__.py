"""Training-data attribution: which training examples raise or lower the loss of a test example, from gradients.

model + training data + loss ──fit──▶ attributor ──scores(test data)──▶ Scores [test, train]
"""

from simfluence._internal.deprecation import renamed_names
from simfluence.attribution import exact
from simfluence.attribution.base import Attributor
from simfluence.attribution.curvature.kronecker import Relative
from simfluence.attribution.from_run import METHODS, attributor_from_run
from simfluence.attribution.gradients.hooks import Gradients, attention_mask
from simfluence.attribution.gradients.labels import draw_classes, draw_normal
from simfluence.attribution.gradients.layers import Factors, Layer
from simfluence.attribution.gradients.per_example import per_example_gradients
from simfluence.attribution.influence import EKFAC, KFAC, Diagonal, Exact
from simfluence.attribution.iterative import Arnoldi, ConjugateGradients, LiSSA
from simfluence.attribution.scores import Scores, TopScores
from simfluence.attribution.similarity import HiddenSimilarity, NGrams, TfIdf, candidates
from simfluence.attribution.tracin import Adam, GradientCosine, GradientDot, TracInCP, TracInIdeal

__getattr__ = renamed_names(
    __name__,
    {
        "of_run": "simfluence.attribution:attributor_from_run",
        "per_example": "simfluence.attribution:per_example_gradients",
        "reference": "simfluence.attribution.exact",
    },
)

__all__ = [
    "EKFAC",
    "KFAC",
    "METHODS",
    "Adam",
    "Arnoldi",
    "Attributor",
    "ConjugateGradients",
    "Diagonal",
    "Exact",
    "Factors",
    "GradientCosine",
    "GradientDot",
    "Gradients",
    "HiddenSimilarity",
    "Layer",
    "LiSSA",
    "NGrams",
    "Relative",
    "Scores",
    "TfIdf",
    "TopScores",
    "TracInCP",
    "TracInIdeal",
    "attention_mask",
    "attributor_from_run",
    "candidates",
    "draw_classes",
    "draw_normal",
    "exact",
    "per_example_gradients",
]
