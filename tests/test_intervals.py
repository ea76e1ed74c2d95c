"""95 % intervals hold the true mean as often as they claim, for the numbers of images that are usual."""
import math
from pathlib import Path

import numpy as np
import pytest

from pruning.metrics import METRICS
from pruning.metrics.intervals import (
    MIN_SAMPLES,
    by_sample,
    mean_ends,
    mean_interval,
    median_interval,
    metric_interval,
    samples_needed,
    t_critical,
)
from pruning.records.record import read_record

# Of 100 intervals, how many hold the true mean, and the 95th percentile of their widths ÷ the median width of Student's
# t: by Student's t, by the studentised bootstrap, and by mean_ends(). The last three are losses of clip_score that were
# measured on 128 images, of which few are large. What 8 images do not show of them, no interval can know.
TABLE = [
    # values, n               hold the mean          widths
    ("normal", 8,             [94.9, 94.6, 95.8],    [1.5, 1.9, 1.8]),
    ("normal", 16,            [95.1, 95.2, 95.7],    [1.3, 1.4, 1.4]),
    ("normal", 32,            [94.8, 94.8, 95.2],    [1.2, 1.2, 1.3]),
    ("exponential", 8,        [89.7, 93.5, 93.5],    [2.0, 4.6, 2.9]),
    ("exponential", 16,       [90.7, 94.3, 94.6],    [1.7, 2.5, 2.4]),
    ("exponential", 32,       [92.7, 94.1, 95.5],    [1.5, 1.7, 2.0]),
    ("heavy tails", 8,        [95.9, 93.2, 96.5],    [2.2, 3.2, 3.1]),
    ("heavy tails", 16,       [96.3, 92.8, 96.6],    [1.9, 2.3, 2.6]),
    ("heavy tails", 32,       [95.2, 91.4, 95.2],    [1.7, 2.0, 2.4]),
    ("outliers", 8,           [97.2, 93.9, 97.6],    [5.1, 14.6, 7.3]),
    ("outliers", 16,          [97.8, 90.7, 98.0],    [2.7, 5.4, 3.8]),
    ("outliers", 32,          [97.4, 87.3, 97.4],    [1.9, 2.8, 2.5]),
    ("outliers below", 8,     [93.7, 92.6, 95.2],    [2.2, 3.8, 3.1]),
    ("outliers below", 16,    [92.4, 91.0, 93.2],    [1.6, 2.1, 2.1]),
    ("outliers below", 32,    [93.0, 92.4, 94.1],    [1.4, 1.6, 1.7]),
    ("structured 0.5", 8,     [92.5, 90.0, 93.6],    [3.0, 5.3, 4.5]),
    ("structured 0.5", 16,    [92.8, 90.2, 93.6],    [2.1, 3.4, 3.2]),
    ("structured 0.5", 32,    [93.4, 90.5, 94.0],    [1.7, 2.1, 2.3]),
    ("iterative 0.7", 8,      [85.6, 88.0, 88.8],    [3.9, 8.5, 5.9]),
    ("iterative 0.7", 16,     [88.8, 89.4, 91.4],    [2.7, 5.7, 4.1]),
    ("iterative 0.7", 32,     [88.9, 91.3, 92.8],    [2.0, 3.3, 3.0]),
    ("reconstruct 0.9", 8,    [74.8, 78.6, 77.2],    [2.8, 10.6, 4.2]),
    ("reconstruct 0.9", 16,   [84.3, 89.8, 90.6],    [1.8, 4.4, 2.6]),
    ("reconstruct 0.9", 32,   [89.0, 93.8, 95.0],    [1.5, 2.3, 2.0]),
]
RECORDS = Path(__file__).resolve().parents[1] / "results" / "bundled" / "shapes-unet" / "shapes"
DRAWS = {  # name -> values (draws, n), and their true mean
    "normal": lambda rng, shape: (rng.normal(size=shape), 0.0),
    "exponential": lambda rng, shape: (rng.exponential(size=shape), 1.0),
    "heavy tails": lambda rng, shape: (rng.standard_t(3, size=shape), 0.0),
    "outliers": lambda rng, shape: (rng.normal(size=shape) * np.where(rng.rand(*shape) < 0.1, 10, 1), 0.0),
    "outliers below": lambda rng, shape: (rng.normal(size=shape) - 5 * (rng.rand(*shape) < 0.05), -0.25),
    "structured 0.5": lambda rng, shape: losses(rng, shape, "structured", 0.5),
    "iterative 0.7": lambda rng, shape: losses(rng, shape, "iterative", 0.7),
    "reconstruct 0.9": lambda rng, shape: losses(rng, shape, "reconstruct", 0.9),
}


def losses(rng, shape, variant, rate):
    """Draw from the paired differences of clip_score of 128 images, of which few are large losses."""
    record = read_record(RECORDS / f"{variant}.json")
    point = next(point for point in record.points if point.rate == rate)
    found = np.subtract(point.per_image["clip_score"], record.dense.per_image["clip_score"])
    return rng.choice(found, shape), found.mean()


def by_students_t(values):
    reach = t_critical(values.shape[1] - 1) * values.std(axis=1, ddof=1) / math.sqrt(values.shape[1])
    return values.mean(axis=1) - reach, values.mean(axis=1) + reach


def by_studentised_bootstrap(values, resamples=400):
    draws, n = values.shape
    drawn = np.random.RandomState(0).multinomial(n, [1 / n] * n, size=resamples).T.astype(float)  # how often each
    centred = values - values.mean(axis=1, keepdims=True)
    means = centred @ drawn / n
    errors = np.sqrt(np.maximum(centred ** 2 @ drawn / n - means ** 2, 1e-12) / (n - 1))
    t = np.sort(means / errors, axis=1)
    error = values.std(axis=1, ddof=1) / math.sqrt(n)
    below, above = (t[:, int(share * resamples)] for share in (0.975, 0.025))
    return values.mean(axis=1) - below * error, values.mean(axis=1) - above * error


@pytest.mark.parametrize(("name", "n", "hold", "widths"), TABLE)
def test_intervals_hold_the_mean_as_often_as_the_table_says(name, n, hold, widths):
    values, truth = DRAWS[name](np.random.RandomState(n), (3000, n))
    ends = [each(values) for each in (by_students_t, by_studentised_bootstrap, mean_ends)]
    usual = np.median(ends[0][1] - ends[0][0])
    assert [100 * np.mean((low <= truth) & (truth <= high)) for low, high in ends] == pytest.approx(hold, abs=0.1)
    assert [np.percentile(high - low, 95) / usual for low, high in ends] == pytest.approx(widths, abs=0.06)


def test_93_of_100_hold_the_mean_of_normal_skewed_and_outlier_laden_values():
    assert min(hold[2] for name, _, hold, _ in TABLE if "0." not in name) >= 93


def test_an_interval_is_repeatable_and_follows_shifts_and_scales_of_the_values():
    values = np.random.RandomState(0).exponential(size=20)
    low, high = mean_interval(values)
    assert mean_interval(values) == (low, high)
    assert high - values.mean() > values.mean() - low > 0  # further on the side of the longer tail
    assert mean_interval(3 * values + 5) == pytest.approx((3 * low + 5, 3 * high + 5))
    assert mean_interval(-values) == pytest.approx((-high, -low))


def test_too_few_values_or_a_value_that_is_not_finite_have_no_interval():
    values = [float(value) for value in range(MIN_SAMPLES)]
    assert mean_interval(values) is not None
    assert mean_interval(values[1:]) is None
    assert mean_interval([]) is None
    assert mean_interval([*values, math.nan]) is None
    assert mean_interval([*values, 1e300]) is None  # its square is not finite


def test_the_interval_of_equal_values_has_no_width():
    assert mean_interval([0.25] * 6) == (0.25, 0.25)


def test_one_outlier_keeps_the_interval_wide_but_does_not_move_it_without_bound():
    low, high = mean_interval([0.0] * 9 + [-20.0])
    assert low < -6
    assert high > 0
    values = [0.1, -0.2, 0.3, 0.0, 0.2, -0.1, 0.1, -17.5]
    student = [ends[0] - np.mean(values) for ends in by_students_t(np.array([values]))]
    low, high = (end - np.mean(values) for end in mean_interval(values))
    assert [low, high] == pytest.approx([2 * student[0], student[1]])


def test_an_interval_stays_inside_the_bounds_of_its_metric():
    near, alike = [0.0] * 15 + [0.3], [1.0] * 15 + [0.2]
    assert mean_interval(near)[0] < 0
    assert metric_interval(METRICS["lpips_dense"], near, near) == (0, mean_interval(near)[1])
    assert mean_interval(alike)[1] > 1
    assert metric_interval(METRICS["ssim_dense"], alike, alike) == (mean_interval(alike)[0], 1)
    dense = [0.05, 0.04, 0.06, 0.05, 0.05, 0.3]  # of a difference, dense's mean and the difference stay inside
    low, _ = metric_interval(METRICS["lpips"], [0.0] * 6, dense)
    assert low + np.mean(dense) == pytest.approx(0)
    assert metric_interval(METRICS["lpips_dense"]._replace(interval=None), near, near) is None


def test_as_many_values_as_needed_tell_the_mean_from_the_limit():
    """Of the samples that cannot tell, most can with as many values as samples_needed() says."""
    rng, told = np.random.RandomState(0), []
    while len(told) < 200:
        values = rng.normal(1, 3, size=16)
        low, high = mean_interval(values)
        if low <= 0 <= high:
            needed = samples_needed(values, 0)
            assert needed > 16
            low, high = mean_interval(rng.normal(1, 3, size=min(math.ceil(needed), 10_000)))
            told.append(not low <= 0 <= high)
    assert 0.7 < np.mean(told) < 0.95
    assert samples_needed([-1.0, 1.0, -2.0, 2.0, 0.0], 0) == math.inf
    assert math.isnan(samples_needed([1.0, math.nan], 0))


def test_the_interval_of_a_median_holds_it_in_95_of_100_cases_whatever_the_values():
    rng = np.random.RandomState(0)
    for count in (6, 12, 24):
        ends = [median_interval(rng.lognormal(sigma=2, size=count)) for _ in range(2000)]
        assert 0.94 < np.mean([low <= 1 <= high for low, high in ends]) < 0.98
    assert median_interval(range(6)) == (0, 5)
    assert median_interval(range(12)) == (2, 9)
    assert median_interval(range(5)) is None
    assert median_interval([]) is None


def test_critical_values_are_those_of_the_table_of_students_t():
    values = [t_critical(degrees) for degrees in (1, 4, 9, 1000)]
    assert values == pytest.approx([12.706, 2.776, 2.262, 1.962], abs=1e-3)


def test_the_noise_seeds_of_a_sample_count_as_one_value():
    values = [1.0, 2.0, 3.0, 11.0, 12.0, None]
    assert np.array_equal(by_sample(values, 2), [6.0, 7.0, math.nan], equal_nan=True)
    with pytest.raises(ValueError, match="reshape"):
        by_sample(values, 4)
