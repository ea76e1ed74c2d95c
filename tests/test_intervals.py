"""Intervals cover the truth as often as they say, at the numbers of images that people have."""
import math

import numpy as np
import pytest

from pruning.metrics.intervals import by_sample, mean_interval

DRAWS = {"normal": (lambda rng, n: rng.normal(size=n), 0.0), "skewed": (lambda rng, n: rng.exponential(size=n), 1.0)}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("count", [8, 32])
def test_95_of_100_intervals_cover_the_mean(name, count):
    draw, truth = DRAWS[name]
    rng = np.random.RandomState(count)
    covered = [low <= truth <= high for low, high in (mean_interval(draw(rng, count)) for _ in range(400))]
    assert 0.91 <= np.mean(covered) <= 0.98


def test_percentiles_of_resampled_means_would_be_too_narrow():
    """Why the bootstrap is studentised: at 8 normal values the plain one covers some 88 of 100."""
    rng, covered = np.random.RandomState(8), []
    for _ in range(400):
        values = rng.normal(size=8)
        low, high = np.percentile(values[rng.randint(8, size=(500, 8))].mean(axis=1), [2.5, 97.5])
        covered.append(low <= 0 <= high)
    assert np.mean(covered) < 0.91


def test_the_same_values_give_the_same_interval_and_shifts_and_scales_carry_over():
    values = np.random.RandomState(0).exponential(size=20)
    low, high = mean_interval(values)
    assert mean_interval(values) == (low, high)
    assert low < values.mean() < high
    assert mean_interval(3 * values + 5) == pytest.approx((3 * low + 5, 3 * high + 5))


def test_no_interval_is_claimed_of_too_few_values_or_of_one_that_is_not_finite():
    assert mean_interval([1.0, 2.0, 3.0, 4.0]) is None
    assert mean_interval([]) is None
    assert mean_interval([1.0, 2.0, 3.0, 4.0, math.nan]) is None


def test_equal_values_have_no_width():
    assert mean_interval([0.25] * 6) == (0.25, 0.25)


def test_one_value_apart_from_equal_ones_leaves_the_interval_wide():
    """Most resamples miss it and have no error of their own, which must not be read as certainty."""
    low, high = mean_interval([0.0] * 9 + [-20.0])
    assert low < -6
    assert high > 0


def test_noise_seeds_of_a_sample_count_as_one_sample():
    values = [1.0, 2.0, 3.0, 11.0, 12.0, None]
    assert np.array_equal(by_sample(values, 2), [6.0, 7.0, math.nan], equal_nan=True)
