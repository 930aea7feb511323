"""Runs rewards: the built-in ones on the calling thread, the user's own (plugins) side by side under a time limit.

A plugin is a function (completion, answer) -> float, named path/to/file.py:function. If it has a parameter `sample`, it
receives the sample's fields as a dict; if it has a parameter `rng`, it receives a random.Random of its own. Plugins run
on several threads in no fixed order, so they must not use the global random state: it would not repeat on resume.

Built-in rewards stay on the calling thread, since math_verify works on the main thread alone.

Left out: a rescue from a call into C that never returns and holds the interpreter's lock; it stops the whole process.
"""

import functools
import inspect
import math
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rewards import REWARDS, load_reward

POOL_SIZE = 8  # calls at once: a judge that needs half a second scores 128 completions in 8 s instead of 64 s
NOT_RUN = "not run: another reward failed first"


@dataclass(frozen=True)
class RewardCall:
    """One reward of one completion."""

    spec: str  # a name of REWARDS or "path/to/file.py:function"
    completion: str
    answer: str
    sample: dict  # id, question, images and the sample's other fields, for a plugin that asks for them
    seed: int  # of the generator that a plugin may ask for


def check_plugin(spec: str) -> None:
    """Raises a ValueError if there is no such reward or its parameters do not fit."""
    function = load_reward(spec)
    try:
        inspect.signature(function).bind("", "", **dict.fromkeys(_extras(spec)))
    except TypeError as error:
        raise ValueError(
            f"reward {spec!r} has the parameters {inspect.signature(function)} and cannot be called: {error}; "
            "define it as (completion, answer) -> float, with `sample` or `rng` after them if it needs them"
        ) from None


@functools.cache
def _extras(spec: str) -> tuple[str, ...]:
    """Which of the optional parameters a reward has."""
    parameters = inspect.signature(load_reward(spec)).parameters
    return tuple(name for name in ("sample", "rng") if name in parameters)


def run_rewards(calls: Sequence[RewardCall], *, seconds: float, stop_at_first: bool) -> list[tuple[float, str]]:
    """The value of each call in order and ""; or 0.0 and the reason why the reward gave no finite number.

    A plugin may take `seconds` of wall time from its start, or any time if that is 0. With `stop_at_first` the first
    failure ends the wait, and the calls that have not finished get the reason NOT_RUN.
    """
    plugins = {number: call for number, call in enumerate(calls) if call.spec not in REWARDS}
    results = dict.fromkeys(plugins, (0.0, NOT_RUN)) | _run_plugins(plugins, seconds, stop_at_first)
    for number, call in enumerate(calls):
        if number not in plugins:
            results[number] = REWARDS[call.spec](call.completion, call.answer), ""
    return [results[number] for number in range(len(calls))]


def _run_plugins(calls: dict[int, RewardCall], seconds: float, stop_at_first: bool) -> dict[int, tuple[float, str]]:
    """The results of the calls by number; with `stop_at_first` only those that are there at the first failure."""
    results: dict[int, tuple[float, str]] = {}
    waiting, deadlines = deque(calls), {}  # a running call has a deadline; the first to start is the first due
    finished: queue.SimpleQueue = queue.SimpleQueue()
    while waiting or deadlines:
        while waiting and len(deadlines) < POOL_SIZE:
            number = waiting.popleft()
            deadlines[number] = time.monotonic() + seconds
            # Daemons: a thread that hangs is left behind and does not keep the process from exiting.
            threading.Thread(target=_answer, args=(number, _bound(calls[number]), finished), daemon=True).start()
        oldest = next(iter(deadlines))
        wait = max(deadlines[oldest] - time.monotonic(), 0) if seconds else None
        try:
            number, result = finished.get(timeout=wait)
        except queue.Empty:
            number, result = oldest, (0.0, f"took longer than {seconds:g} s (--reward_seconds)")
        if deadlines.pop(number, None) is None:
            continue  # it came after its time limit
        results[number] = result
        if stop_at_first and result[1]:
            break
    return results


def _bound(call: RewardCall) -> Callable[[], float]:
    """The plugin with the arguments of a call, ready to run."""
    offered = {"sample": call.sample, "rng": random.Random(call.seed)}
    extra = {name: offered[name] for name in _extras(call.spec)}
    return functools.partial(load_reward(call.spec), call.completion, call.answer, **extra)


def _answer(number: int, plugin: Callable[[], float], finished: queue.SimpleQueue) -> None:
    """Puts the number of a call and its result into the queue."""
    try:
        value = float(plugin())
    except BaseException as error:  # SystemExit too: without a result the caller would wait forever
        finished.put((number, (0.0, f"raised {type(error).__name__}: {error}")))
        return
    if math.isfinite(value):
        finished.put((number, (value, "")))
    else:
        finished.put((number, (0.0, f"gave {value}, which is not a finite number")))
