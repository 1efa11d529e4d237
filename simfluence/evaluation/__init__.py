"""How good is a forecast, or an attribution? Metrics, tables, tuning, learning curves."""

from simfluence.evaluation.attribution import LDS, agreement, brittleness, lds
from simfluence.evaluation.groups import Groups, groups_of
from simfluence.evaluation.held_out import METRICS, EvaluationTable, evaluate, skill_over_steps
from simfluence.evaluation.learning_curves import learning_curve
from simfluence.evaluation.metrics import (
    all_steps_mse,
    coverage,
    delta_correlation,
    final_skill,
    final_spearman,
    group_correlation,
    harmful_hit_rate,
    hit_rate,
    relative_error,
    run_correlation,
    seed_share,
    skill,
    within_correlation,
)
from simfluence.evaluation.tuning import Search, search, tune

__all__ = [
    "LDS",
    "METRICS",
    "EvaluationTable",
    "Groups",
    "Search",
    "agreement",
    "all_steps_mse",
    "brittleness",
    "coverage",
    "delta_correlation",
    "evaluate",
    "final_skill",
    "final_spearman",
    "group_correlation",
    "groups_of",
    "harmful_hit_rate",
    "hit_rate",
    "lds",
    "learning_curve",
    "relative_error",
    "run_correlation",
    "search",
    "seed_share",
    "skill",
    "skill_over_steps",
    "tune",
    "within_correlation",
]
