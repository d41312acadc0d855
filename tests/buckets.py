"""T18, T19: the bucket of a distance in whole numbers: where logarithms are compared, powers are, so nothing rounds."""


def t5_bucket(distance, n, last, *, causal):
    """Raffel et al. 2020: half of the buckets of one distance each, then log-spaced ones up to `last`."""
    if causal:
        return _t5_side(max(-distance, 0), n, last)
    return (n // 2 if distance > 0 else 0) + _t5_side(abs(distance), n // 2, last)


def _t5_side(far, n, last):
    exact = n // 2
    if far < exact:
        return far
    steps = 0  # the most for which (far / exact)^(n - exact) >= (last / exact)^steps
    while exact + steps < n - 1 and far ** (n - exact) * exact ** (steps + 1) >= last ** (steps + 1) * exact ** (
        n - exact
    ):
        steps += 1
    return exact + steps


def deberta_bucket(distance, n, last):
    """He et al. 2021: n on each side, 0 and n/2 distances of one each, then log-spaced ones up to `last` - 1."""
    exact, far = n // 2, abs(distance)
    bucket = far
    if far > exact:
        steps = 0  # the least for which (far / exact)^(exact - 1) <= ((last - 1) / exact)^steps
        while far ** (exact - 1) * exact**steps > (last - 1) ** steps * exact ** (exact - 1):
            steps += 1
        bucket = exact + steps
    return min(max(n - bucket if distance > 0 else n + bucket, 0), 2 * n - 1)
