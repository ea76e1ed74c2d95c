"""95 % intervals of means: how much they vary from one choice of samples to another. Loads without torch and scipy."""
from __future__ import annotations

import math
from typing import Optional, Tuple

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000
MIN_SAMPLES = 5  # with fewer values, too many resamples hold one value only

Interval = Optional[Tuple[float, float]]


def mean_interval(values) -> Interval:
    """Return the 95 % interval (low, high) of the mean of independent values (n,).

    Returns None for fewer than MIN_SAMPLES values, or if a value is not finite. If all values are equal, low and high
    are that value. Studentised bootstrap (Efron & Tibshirani, 1993, section 12.5) with a fixed seed: it covers the true
    mean in about 95 of 100 cases even for few values, for which percentiles of resampled means are too narrow.
    """
    values = np.asarray(values, float)
    count, mean = len(values), values.mean() if len(values) else math.nan
    if count < MIN_SAMPLES or not np.isfinite(values).all():
        return None
    centred = values - mean
    error = centred.std(ddof=1) / math.sqrt(count)
    if error <= 1e-12 * max(1.0, abs(mean)):
        return float(mean), float(mean)
    t = np.sort(_studentised(centred))
    low, high = (t[int(share * RESAMPLES)] for share in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    # If most values are equal, many resamples have no standard error. Student's t then replaces their quantile.
    low, high = (end if math.isfinite(end) else math.copysign(t_critical(count - 1), end) for end in (low, high))
    return float(mean - high * error), float(mean - low * error)


def _studentised(centred: np.ndarray) -> np.ndarray:
    """Return mean ÷ standard error of RESAMPLES resamples of values (n,) whose mean is 0; ±inf if the error is 0."""
    count, rng = len(centred), np.random.RandomState(0)  # numpy guarantees that this stream never changes
    rows, ratios = max(1, 2 ** 21 // count), []
    for start in range(0, RESAMPLES, rows):
        drawn = centred[rng.randint(count, size=(min(rows, RESAMPLES - start), count))]
        means = drawn.mean(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios.append(means / (drawn.std(axis=1, ddof=1) / math.sqrt(count)))
    return np.nan_to_num(np.concatenate(ratios), nan=0.0, posinf=math.inf, neginf=-math.inf)


def t_critical(degrees: int) -> float:
    """Return the two-sided critical value of Student's t at LEVEL for these degrees of freedom (1 or more).

    An interval reaches this many standard errors to each side of the estimate.
    """
    from scipy.special import stdtrit  # importing scipy at the top would slow every --help down

    return float(stdtrit(degrees, (1 + LEVEL) / 2))


def by_sample(values, seeds: int = 1) -> np.ndarray:
    """Return the mean of each sample over its noise seeds, (n,), from the values of all images, (seeds * n,).

    The values are ordered seed by seed. Values of one sample depend on each other; the means of different samples do
    not. None counts as NaN. Raises ValueError if the number of values is not a multiple of `seeds`.
    """
    return np.array([math.nan if value is None else value for value in values], float).reshape(seeds, -1).mean(axis=0)
