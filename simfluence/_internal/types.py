"""Array types of the public functions. Axes are named once, here.

``runs``   one entry per training run        ``times``  steps + 1: before any update, then after each step
``steps``  one entry per batch               ``train``, ``test``  one entry per training or test example
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import pandas as pd
from annotated_types import Ge, Interval
from jaxtyping import Float, Int

from simfluence._internal.targets import Selection

Indices = Int[np.ndarray, " k"]
RunLosses = Float[np.ndarray, "times test"]
Losses = Float[np.ndarray, "runs times test"]
InitialLosses = Float[np.ndarray, "runs test"]

#: Numbers within bounds, which ``checked`` enforces.
Count = Annotated[int, Ge(1)]
Seed = Annotated[int, Ge(0)]
Share = Annotated[float, Interval(gt=0, lt=1)]

#: A selection of examples: a filter over their metadata, a list of rows or of ids, a boolean mask, or a mapping
#: ``{"rows": […]}`` or ``{"ids": […]}``.
Target = str | Sequence[Any] | np.ndarray | pd.Series | pd.Index | Mapping[str, Any] | Selection
