"""95 % intervals cover the true mean as often as they claim, for the numbers of images that are usual."""
import math

import numpy as np
import pytest

from pruning.metrics.intervals import MIN_SAMPLES, by_sample, mean_interval, t_critical

DRAWS = {"normal": (lambda rng, n: rng.normal(size=n), 0.0), "skewed": (lambda rng, n: rng.exponential(size=n), 1.0)}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("count", [8, 32])
def test_95_of_100_intervals_cover_the_mean(name, count):
    draw, truth = DRAWS[name]
    rng = np.random.RandomState(count)
    covered = [low <= truth <= high for low, high in (mean_interval(draw(rng, count)) for _ in range(400))]
    assert 0.91 <= np.mean(covered) <= 0.98


def test_percentiles_of_resampled_means_would_be_too_narrow():
    """The bootstrap is studentised because the plain one covers only about 88 of 100 for 8 normal values."""
    rng, covered = np.random.RandomState(8), []
    for _ in range(400):
        values = rng.normal(size=8)
        low, high = np.percentile(values[rng.randint(8, size=(500, 8))].mean(axis=1), [2.5, 97.5])
        covered.append(low <= 0 <= high)
    assert np.mean(covered) < 0.91


def test_an_interval_is_repeatable_and_follows_shifts_and_scales_of_the_values():
    values = np.random.RandomState(0).exponential(size=20)
    low, high = mean_interval(values)
    assert mean_interval(values) == (low, high)
    assert low < values.mean() < high
    assert mean_interval(3 * values + 5) == pytest.approx((3 * low + 5, 3 * high + 5))


def test_too_few_values_or_a_value_that_is_not_finite_have_no_interval():
    values = [float(value) for value in range(MIN_SAMPLES)]
    assert mean_interval(values) is not None
    assert mean_interval(values[1:]) is None
    assert mean_interval([]) is None
    assert mean_interval([*values, math.nan]) is None


def test_the_interval_of_equal_values_has_no_width():
    assert mean_interval([0.25] * 6) == (0.25, 0.25)


def test_one_outlier_among_equal_values_keeps_the_interval_wide():
    """Most resamples do not contain the outlier and have a standard error of 0, which must not count as certainty."""
    low, high = mean_interval([0.0] * 9 + [-20.0])
    assert low < -6
    assert high > 0


def test_critical_values_are_those_of_the_table_of_students_t():
    values = [t_critical(degrees) for degrees in (1, 4, 9, 1000)]
    assert values == pytest.approx([12.706, 2.776, 2.262, 1.962], abs=1e-3)


def test_the_noise_seeds_of_a_sample_count_as_one_value():
    values = [1.0, 2.0, 3.0, 11.0, 12.0, None]
    assert np.array_equal(by_sample(values, 2), [6.0, 7.0, math.nan], equal_nan=True)
    with pytest.raises(ValueError, match="reshape"):
        by_sample(values, 4)
