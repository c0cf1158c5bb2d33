"""The heap of a process that computes on a CPU."""

import ctypes

_MMAP_MAX, _TRIM_THRESHOLD, _ARENA_MAX = (-4, 0), (-1, 2**31 - 1), (-8, 1)  # mallopt(3); one heap for all threads


def keep_freed_memory() -> None:
    """Have glibc hand the freed tensors of one pass to the next, instead of to the system and back, page by page.

    The pages of a new mapping are filled with zeros on first touch, at a tenth of the speed of memory: 5 to 10 % of a
    step. Does nothing where there is another allocator.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    for parameter, value in (_MMAP_MAX, _TRIM_THRESHOLD, _ARENA_MAX):
        mallopt(parameter, value)
