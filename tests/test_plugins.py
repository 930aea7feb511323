"""Tests of infra/plugins.py: order, concurrency, exactness, time limits, and refused signatures."""

import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from infra.plugins import NOT_RUN, POOL_SIZE, RewardCall, check_plugin, run_rewards
from rewards import REWARDS

PLUGINS = """
import math, sys, threading, time

together = threading.Barrier(8)

def length(completion, answer):
    time.sleep(0.02 * (5 - len(completion)))  # the last to start is the first to finish
    return len(completion) + len(answer) / 10

def meet(completion, answer):
    return together.wait(timeout=20) >= 0  # passes if eight calls are under way at once

def judge(completion, answer, sample, rng):
    return sample["weight"] + rng.random()

def drawn(completion, answer, *, rng):
    time.sleep(0.01 * rng.random())
    return rng.random()

def crowded(completion, answer):
    crowd.append(1)
    time.sleep(0.02)
    most = len(crowd)
    crowd.pop()
    return most

crowd = []

def hang(completion, answer):
    if completion == "hang":
        time.sleep(60)
    return 1.0

def slow(completion, answer):
    time.sleep(1.2 if completion == "late" else 0.3)
    return 1.0

def fail(completion, answer):
    if completion == "quit":
        sys.exit("enough")
    return 1 / len(completion)

def odd(completion, answer):
    return {"nan": math.nan, "inf": math.inf, "none": None, "word": "high", "yes": True}[completion]

def one_parameter(completion): return 0.0
def another_parameter(completion, answer, threshold): return 0.0
def sample_first(sample, completion, answer): return 0.0
def any_further(completion, answer, threshold=0.5, **others): return 0.0
NUMBER = 3
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """A function from the name of a plugin to its spec."""
    path = tmp_path_factory.mktemp("plugins") / "mine.py"
    path.write_text(PLUGINS)
    return lambda name: f"{path}:{name}"


def calls(spec: str, *completions: str, answer: str = "truth") -> list[RewardCall]:
    return [RewardCall(spec, text, answer, {"id": str(n), "weight": 10.0}, n) for n, text in enumerate(completions)]


def test_values_come_back_in_the_order_of_the_calls(plugin):
    completions = ["", "a", "ab", "abc", "abcd", "abcde"]
    results = run_rewards(calls(plugin("length"), *completions), seconds=10, stop_at_first=False)
    assert results == [(len(text) + 0.5, "") for text in completions]
    assert run_rewards([], seconds=10, stop_at_first=True) == []


def test_plugins_run_at_once_but_no_more_than_the_pool_holds(plugin):
    assert POOL_SIZE == 8
    assert run_rewards(calls(plugin("meet"), *"abcdefgh"), seconds=30, stop_at_first=False) == [(1.0, "")] * 8
    most = [value for value, _ in run_rewards(calls(plugin("crowded"), *"ab" * 20), seconds=10, stop_at_first=False)]
    assert 1 < max(most) <= POOL_SIZE


def test_built_in_rewards_run_on_the_calling_thread_beside_plugins(plugin, monkeypatch):
    threads = []
    monkeypatch.setitem(
        REWARDS, "here", lambda completion, answer: float(not threads.append(threading.current_thread()))
    )
    mixed = [RewardCall("here", "a", "b", {}, 0), *calls(plugin("slow"), "x"), RewardCall("all_match", "a", "b", {}, 0)]
    assert run_rewards(mixed, seconds=10, stop_at_first=False) == [(1.0, ""), (1.0, ""), (0.0, "")]
    assert threads == [threading.current_thread()]


def test_a_plugin_draws_the_same_numbers_in_every_run_whatever_the_global_state(plugin):
    once, again = [], []
    for results in (once, again):
        random.seed(len(again))
        results += run_rewards(calls(plugin("drawn"), *"abcdefghij"), seconds=10, stop_at_first=False)
        random.seed(7)
    assert once == again and len(set(once)) == 10
    generator = random.Random(3)
    generator.random()
    assert once[3] == (generator.random(), "")


def test_a_plugin_that_asks_receives_the_sample_and_others_do_not(plugin):
    [(value, reason)] = run_rewards(calls(plugin("judge"), "x"), seconds=10, stop_at_first=False)
    assert reason == "" and value == 10.0 + random.Random(0).random()
    assert run_rewards(calls(plugin("any_further"), "x"), seconds=10, stop_at_first=False) == [(0.0, "")]


def test_a_hanging_reward_costs_its_limit_once_if_the_first_failure_stops(plugin):
    start = time.monotonic()
    results = run_rewards(calls(plugin("hang"), *["hang"] * 20), seconds=0.5, stop_at_first=True)
    assert 0.5 <= time.monotonic() - start < 5
    reasons = [reason for _, reason in results]
    assert reasons.count("took longer than 0.5 s (--reward_seconds)") == 1 and reasons.count(NOT_RUN) == 19
    assert {value for value, _ in results} == {0.0}


def test_a_hanging_reward_is_left_behind_while_the_others_finish(plugin):
    texts = ["hang", *["fine"] * 10, "hang"]
    results = run_rewards(calls(plugin("hang"), *texts), seconds=0.5, stop_at_first=False)
    gave_up = (0.0, "took longer than 0.5 s (--reward_seconds)")
    assert results == [gave_up, *[(1.0, "")] * 10, gave_up]


def test_the_time_limit_starts_with_the_call_and_not_with_the_queue(plugin):
    # Four rounds of 0.3 s take longer than the limit of a second, but no single call does.
    results = run_rewards(calls(plugin("slow"), *"x" * (3 * POOL_SIZE + 1)), seconds=1, stop_at_first=True)
    assert results == [(1.0, "")] * (3 * POOL_SIZE + 1)
    assert run_rewards(calls(plugin("slow"), "x"), seconds=0, stop_at_first=True) == [(1.0, "")]  # 0 is no limit


def test_a_value_that_comes_after_the_limit_does_not_count(plugin):
    # The calls that follow take until 1.5 s, so the late value arrives while the others are waited for.
    results = run_rewards(calls(plugin("slow"), "late", *"x" * 35), seconds=1, stop_at_first=False)
    assert results == [(0.0, "took longer than 1 s (--reward_seconds)"), *[(1.0, "")] * 35]


def test_a_hanging_reward_does_not_keep_the_process_from_exiting(plugin):
    code = (
        "import sys; from infra.plugins import RewardCall, run_rewards\n"
        "call = RewardCall(sys.argv[1], 'hang', '', {}, 0)\n"
        "print(run_rewards([call], seconds=0.2, stop_at_first=True))"
    )
    root = str(Path(__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", code, plugin("hang")], cwd=root, capture_output=True, timeout=30)
    assert done.returncode == 0 and b"took longer than 0.2 s" in done.stdout


def test_what_a_plugin_raises_is_the_reason(plugin):
    results = run_rewards(calls(plugin("fail"), "ab", "", "quit"), seconds=10, stop_at_first=False)
    assert results == [
        (0.5, ""),
        (0.0, "raised ZeroDivisionError: division by zero"),
        (0.0, "raised SystemExit: enough"),
    ]


def test_a_result_that_is_no_finite_number_is_a_failure(plugin):
    texts = ("nan", "inf", "none", "word", "yes")
    results = run_rewards(calls(plugin("odd"), *texts), seconds=10, stop_at_first=False)
    assert [value for value, _ in results] == [0.0, 0.0, 0.0, 0.0, 1.0]
    assert (
        results[0][1] == "gave nan, which is not a finite number"
        and results[1][1] == "gave inf, which is not a finite number"
    )
    assert "raised TypeError" in results[2][1] and "raised ValueError" in results[3][1] and results[4][1] == ""


def test_the_first_failure_ends_the_wait(plugin):
    mixed = calls(plugin("hang"), *["hang"] * 7) + calls(plugin("fail"), "")
    start = time.monotonic()
    results = run_rewards(mixed, seconds=0, stop_at_first=True)
    assert time.monotonic() - start < 5
    assert results == [(0.0, NOT_RUN)] * 7 + [(0.0, "raised ZeroDivisionError: division by zero")]


@pytest.mark.parametrize("name", ["one_parameter", "another_parameter", "sample_first"])
def test_a_plugin_whose_parameters_do_not_fit_is_refused_with_those_expected(plugin, name):
    with pytest.raises(ValueError, match=rf"{name}.*\(.*completion.*define it as \(completion, answer\) -> float"):
        check_plugin(plugin(name))


@pytest.mark.parametrize("name", ["length", "judge", "drawn", "any_further"])
def test_a_plugin_that_takes_completion_and_answer_is_accepted(plugin, name):
    check_plugin(plugin(name))
    check_plugin("iou")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("ioo", "unknown"),
        ("absent.py:shout", "there is no file"),
        ("{}:quiet", "no function"),
        ("{}:NUMBER", "no function"),
    ],
)
def test_a_reward_that_does_not_exist_is_refused(plugin, spec, reason):
    with pytest.raises(ValueError, match=reason):
        check_plugin(spec.format(plugin("x").rpartition(":")[0]))
