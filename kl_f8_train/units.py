"""Numbers and names as people read them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

SIZES = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0}
MEMORY_SIZES = {"GiB": 2.0**30, "MiB": 2.0**20, "KiB": 2.0**10, "B": 1.0}


def duration(seconds: float) -> str:
    """3 d 4 h, 2 h 5 min, 3 min 20 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def size(count: float) -> str:
    """Bytes of files, disks and networks, in powers of 1000: 950 B, 12 MB, 1.23 GB."""
    return _scaled(count, SIZES)


def memory(count: float) -> str:
    """Bytes of memory in powers of 1024, as torch and nvidia-smi count: 512 MiB, 7.33 GiB."""
    return _scaled(count, MEMORY_SIZES)


def _scaled(count: float, units: dict[str, float]) -> str:
    for unit, factor in units.items():
        if abs(count) >= 0.9995 * factor:
            digits = f"{count / factor:.3g}"  # 1,000 to 1,023 MiB would get an exponent
            return f"{count / factor:,.0f} {unit}" if "e" in digits else f"{digits} {unit}"
    return "0 B"


def batch(global_batch: int, processes: int, micro_batch: int) -> str:
    """How an iteration is dealt: 96 images, 8 micro-batches of 12; or over several processes."""
    micro_batches = global_batch // processes // micro_batch
    if processes > 1:
        return (
            f"{counted(processes, 'process', 'es')} x {counted(micro_batch, 'image', 's')} x "
            f"{counted(micro_batches, 'micro-batch', 'es')} = {global_batch:,}"
        )
    dealt = "at once"
    if micro_batches != 1:
        dealt = f"in {micro_batches:,} micro-batches of {micro_batch:,}"
    return f"{counted(global_batch, 'image', 's')}, {dealt}"


def written(value: Any) -> str:
    """A setting's value as a recipe has it: null, true, {weight: 0.5}; strings bare, but in lists.

    [1, null], ['width >= 256']: a list's strings may contain commas.
    """
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(quoted, value))}]"
    return str(value) if value != "" else "''"


def quoted(value: Any) -> str:
    """`written`, with quotes around a string: 'abc', null."""
    return repr(value) if isinstance(value, str) else written(value)


def shortest(value: float) -> str:
    """The shortest digits that read as this very number: 0.9999, 0, 1e-05."""
    return repr(value).removesuffix(".0")


def speed(images_per_second: float) -> str:
    """Three digits, without an exponent: 0.042, 3.15, 87.3, 1,810 images/s."""
    if images_per_second >= 99.95:  # which :.3g would write as 1e+02
        return f"{images_per_second:,.0f} images/s"
    return f"{images_per_second:.3g} images/s" if images_per_second >= 1e-3 else "0 images/s"


def figure(value: float) -> str:
    """Four digits, without an exponent for large numbers: 0.03412, 12.35, 130,900."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def counted(number: int, noun: str, ending: str) -> str:
    """1 process, 2 processes, 1,000 processes: a number with its noun."""
    return f"{number:,} {noun}{ending * (number != 1)}"


def listed(names: Sequence[str]) -> str:
    """A; A and B; A, B and C."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def are(number: int) -> str:
    """The verb that goes with a number: 1 tensor is, 2 tensors are."""
    return "is" if number == 1 else "are"


def printable(name: str) -> str:
    r"""A file name to print: bytes that are not UTF-8, and control characters, become \xe9."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda c: ascii(c[0])[1:-1], text)
