"""Room for keys and values, as much as limits and memory have it."""

from trinity.base.errors import UsageError
from trinity.base.units import show_bytes
from trinity.config.engine import EngineLimits
from trinity.engine.pages import PAGE, Pools, kv_bytes_per_token, pages_for, ring_bytes
from trinity.engine.runner import Runner, kv_dtype_of
from trinity.kernels.heap import available_bytes

SHARE = 0.5  # of the memory that is free, which pages may take where nobody says how much


def pools_for(runner: Runner, limits: EngineLimits) -> Pools:
    """Room for keys and values as the limits have it. UsageError where it would not hold even one page a request.

    Pages, rings and windows are taken little by little; the sum of them all must be free now, beside what a step needs.
    """
    config, kv_dtype = runner.config, kv_dtype_of(runner, limits.kv_dtype)
    page = PAGE * max(1, kv_bytes_per_token(config, kv_dtype))
    rings = limits.max_active * ring_bytes(config, limits.step_tokens, kv_dtype)
    wanted, free = limits.max_active * pages_for(config.max_position_embeddings), available_bytes(runner.device)
    free = free if free is None else max(0, free - runner.step_bytes)
    before = rings + limits.window_bytes
    if free is not None and before > free:
        raise UsageError(
            f"Rings for {limits.max_active} requests take {show_bytes(rings)} and windows "
            f"{show_bytes(limits.window_bytes)}; {show_bytes(free)} are free, and pages need room, too.",
            "Lower window_bytes, max_active or step_tokens, or free memory.",
        )
    if limits.kv_bytes:
        pages = min(wanted, limits.kv_bytes // page)
    else:
        rest = wanted * page if free is None else int(SHARE * (free - before))
        pages = min(wanted, rest // page)
    needed = pages * page + before
    if free is not None and needed > free:
        raise UsageError(
            f"Keys and values may take {show_bytes(needed)}: {show_bytes(pages * page)} of pages, {show_bytes(rings)} "
            f"of rings for {limits.max_active} requests, {show_bytes(limits.window_bytes)} of windows; "
            f"{show_bytes(free)} are free.",
            "Lower kv_bytes, max_active, step_tokens or window_bytes, or free memory.",
        )
    if pages < limits.max_active:
        raise UsageError(
            f"There is room for {pages} pages of 64 tokens ({show_bytes(page)} each) among "
            f"{limits.max_active} requests.",
            "Raise kv_bytes, lower max_active, or free memory.",
        )
    return Pools(config, pages, limits.max_active, limits.step_tokens, runner.device, kv_dtype)
