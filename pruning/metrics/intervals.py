"""How sure a number is, given the images that it was measured on: 95 % intervals. No torch, so figures can ask too."""
from __future__ import annotations

import math
from typing import Optional, Tuple

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000
FEWEST = 5  # values; of fewer, resamples of one value alone are too many

Interval = Optional[Tuple[float, float]]


def mean_interval(values) -> Interval:
    """Of the mean of independent values (n,): None for fewer than FEWEST or where one is not finite.

    Studentised bootstrap (Efron & Tibshirani, 1993, ch. 12.5), seeded. Its coverage stays near 95 % at small n,
    where the percentiles of resampled means are too narrow.
    """
    values = np.asarray(values, float)
    count, mean = len(values), values.mean() if len(values) else math.nan
    if count < FEWEST or not np.isfinite(values).all():
        return None
    centred = values - mean
    error = centred.std(ddof=1) / math.sqrt(count)
    if error <= 1e-12 * max(1.0, abs(mean)):
        return float(mean), float(mean)
    t = np.sort(_studentised(centred))
    low, high = (t[int(share * RESAMPLES)] for share in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    # Where most values are equal, resamples without the others have no error: Student's t has to do.
    low, high = (end if math.isfinite(end) else math.copysign(student(count - 1), end) for end in (low, high))
    return float(mean - high * error), float(mean - low * error)


def _studentised(centred: np.ndarray) -> np.ndarray:
    """Mean ÷ standard error of RESAMPLES resamples of values whose mean is 0; infinite where the error is 0."""
    count, rng = len(centred), np.random.RandomState(0)  # a stream that numpy's policy keeps as it is
    rows, found = max(1, 2 ** 21 // count), []
    for start in range(0, RESAMPLES, rows):
        drawn = centred[rng.randint(count, size=(min(rows, RESAMPLES - start), count))]
        means = drawn.mean(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            found.append(means / (drawn.std(axis=1, ddof=1) / math.sqrt(count)))
    return np.nan_to_num(np.concatenate(found), nan=0.0, posinf=math.inf, neginf=-math.inf)


def student(freedom: int) -> float:
    """How many standard errors an interval reaches to either side, by Student's t."""
    from scipy.special import stdtrit  # here, or each --help would wait for it
    return float(stdtrit(freedom, (1 + LEVEL) / 2))


def by_sample(values, seeds: int = 1) -> np.ndarray:
    """Values of images (seeds * n,), one noise seed after another -> means of the samples (n,), which are independent.

    None becomes NaN.
    """
    return np.array([math.nan if value is None else value for value in values], float).reshape(seeds, -1).mean(axis=0)
