"""Training-data attribution: which training examples raise or lower the loss of a test example, from gradients.

model + training data + loss ──fit──▶ attributor ──scores(test data)──▶ Scores [test, train]
"""

from simfluence.attribution import reference
from simfluence.attribution.base import Attributor
from simfluence.attribution.curvature import Relative
from simfluence.attribution.finding import per_example
from simfluence.attribution.gradients import Gradients, attention_mask
from simfluence.attribution.ideal import TracInIdeal
from simfluence.attribution.influence import EKFAC, KFAC, Diagonal, Exact
from simfluence.attribution.iterative import Arnoldi, ConjugateGradients, LiSSA
from simfluence.attribution.labels import draw_classes, draw_normal
from simfluence.attribution.layers import Factors, Layer
from simfluence.attribution.of_run import METHODS, of_run
from simfluence.attribution.scores import Scores, TopScores
from simfluence.attribution.similarity import HiddenSimilarity, NGrams, TfIdf, candidates
from simfluence.attribution.tracin import Adam, GradientCosine, GradientDot, TracInCP

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
    "candidates",
    "draw_classes",
    "draw_normal",
    "of_run",
    "per_example",
    "reference",
]
