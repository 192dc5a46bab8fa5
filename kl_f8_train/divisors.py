"""Divisors of a whole number: batches and images are cut into equal parts."""

import math


def divisors(number: int) -> list[int]:
    """All divisors, the smallest first."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def divisor_up_to(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`."""
    return max(divisor for divisor in divisors(number) if divisor <= most)
