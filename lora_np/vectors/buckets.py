"""T18, T19: the bucket of a distance in whole numbers: where logarithms are compared, powers are, so nothing rounds."""

from __future__ import annotations


def t5_bucket(distance: int, n: int, last: int, *, causal: bool) -> int:
    """Raffel et al. 2020: half of the buckets of one distance each, then log-spaced ones up to `last`."""
    if causal:
        return _t5_side(max(-distance, 0), n, last)
    return (n // 2 if distance > 0 else 0) + _t5_side(abs(distance), n // 2, last)


def _t5_side(far: int, n: int, last: int) -> int:
    exact = n // 2
    if far < exact:
        return far
    steps, m = 0, n - exact  # the most steps, below m, for which (far / exact)^m >= (last / exact)^steps
    while steps < m - 1 and far**m * exact ** (steps + 1) >= last ** (steps + 1) * exact**m:
        steps += 1
    return exact + steps


def deberta_bucket(distance: int, n: int, last: int) -> int:
    """He et al. 2021: n on each side, 0 and n/2 distances of one each, then log-spaced ones up to `last` - 1."""
    exact, far = n // 2, abs(distance)
    bucket = far
    if far > exact:
        steps, m = 0, exact - 1  # the fewest steps for which (far / exact)^m <= ((last - 1) / exact)^steps
        while far**m * exact**steps > (last - 1) ** steps * exact**m:
            steps += 1
        bucket = exact + steps
    return min(max(n - bucket if distance > 0 else n + bucket, 0), 2 * n - 1)
