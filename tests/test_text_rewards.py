"""Tests of the rewards of choices, words, texts, numbers and formulas.

The cases from VLM-R1 are those of its functions run on the text shown; where ours differs on purpose, the test says so.
"""

import concurrent.futures
import random
import sys
import types

import pytest

from rewards import REWARDS, check_truth, clean_text, find_choice, plain_number, same_value, similarity


@pytest.fixture(autouse=True)
def without_math_verify(monkeypatch):
    """Tests do not depend on whether math_verify is installed."""
    monkeypatch.setitem(sys.modules, "math_verify", None)


def answered(text: str) -> str:
    return f"<think>so</think><answer>{text}</answer>"


# ---- choices, words and texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "letter"),
    [("A", "A"), ("A.", "A"), ("The answer is B", "B"), ("a", "A"), ("B, C", "C"), ("A cat", None), ("f(x)", None)]
    + [
        (text, "B")
        for text in ("(B)", "B) cat", "**B**", "[B]", "<b>B</b>", "\\boxed{B}", "The answer is (B).", "B。", "(b) cat")
    ]
    + [("I don't know", None), ("option A is right", None), ("", None)],
)
def test_choices_are_found_as_in_vlm_r1_and_also_in_brackets_and_bold(said, letter):
    assert find_choice(said) == letter
    assert REWARDS["mcq"](answered(said), "B") == (letter == "B")


def test_the_truth_of_a_choice_may_be_in_brackets_and_a_truth_without_one_pays_nothing():
    for truth in ("(B) a dog", "B) a dog", "<answer> B </answer>", "b."):
        assert REWARDS["mcq"](answered("B"), truth) == 1.0 and REWARDS["mcq"](answered("A"), truth) == 0.0
    assert REWARDS["mcq"](answered("dog"), "dog") == REWARDS["mcq"](answered("B") + answered("A"), "A") == 0.0


@pytest.mark.parametrize(
    ("said", "true", "expected"),
    [
        ("Yes.", "yes", 1.0),
        ("No, it is not. Yes?", "no", 1.0),
        ("yes", "no", 0.0),
        ("I do not know", "no", 0.0),  # VLM-R1: 1, from kNOw
        ("None", "no", 0.0),
        ("the eyes", "Yes", 0.0),
        ("maybe", "perhaps", 0.0),  # VLM-R1: 1, as neither says either
    ],
)
def test_yes_and_no_are_words(said, true, expected):
    assert REWARDS["yes_no"](answered(said), true) == REWARDS["yes_no"](said, f"<answer> {true} </answer>") == expected


def test_all_match_ignores_case_line_breaks_and_full_stops_at_the_end():
    assert REWARDS["all_match"]("No Defect.", "no defect") == 1.0
    assert REWARDS["all_match"](answered("No\nDefect"), "No Defect") == 1.0
    assert REWARDS["all_match"]("No Defects", "No Defect") == 0.0
    assert clean_text("a \n b") == "a  b" and clean_text("<answer>x</answer><answer> Y..\r\n</answer>") == "y"


def plain_similarity(a: str, b: str) -> float:
    """2 x LCS / (len(a) + len(b)) by the table of all prefixes."""
    row = [0] * (len(b) + 1)
    for x in a:
        above, row = row, [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
    return 2 * row[-1] / (len(a) + len(b)) if a or b else 1.0


def test_similarity_is_that_of_the_longest_common_subsequence():
    draw = random.Random(3)
    for _ in range(500):
        a, b = ("".join(draw.choices("abc é", k=draw.randint(0, 90))) for _ in range(2))
        assert similarity(a, b) == similarity(b, a) == pytest.approx(plain_similarity(a, b), abs=1e-15)


@pytest.mark.parametrize(
    ("said", "true", "expected"),
    [
        ("3 apples", "4 apples", 14 / 16),
        ("red", "blue", 2 / 7),
        ("the cat sat", "a cat sat", 16 / 20),
        ("Unexpected Task Result", "Operation No Response", 16 / 43),
        ("no tags 3", "3", 0.2),
        ("4", "5", 0.0),
        ("(A)", "A", 1.0),
        ("B", "A", 0.0),
        ("cat", "A", 0.0),
        ("1,000", "1000", 1.0),  # VLM-R1 without math_verify: 8/9, with it 1
        ("1/2", "0.5", 1.0),
    ],
)
def test_the_default_reward_compares_numbers_then_choices_then_characters(said, true, expected):
    assert REWARDS["default"](answered(said), true) == REWARDS["default"](said, f"<answer> {true} </answer>")
    assert REWARDS["default"](answered(said), true) == pytest.approx(expected, abs=1e-12)


def test_long_texts_that_differ_are_not_similar_at_all():
    assert similarity("a" * 5_000, "a" * 5_000) == 1.0 and similarity("a" * 5_000, "a" * 4_999) == 0.0


# ---- numbers and formulas ------------------------------------------------------------------------------------------


def test_plain_numbers_are_compared_as_floats():
    assert REWARDS["numeric"](answered(" 5.0\n"), "5") == 1.0
    assert REWARDS["numeric"]("<answer>6</answer> <answer>1e3</answer>", "1000.") == 1.0
    assert REWARDS["numeric"]("5 cm", "5") == REWARDS["numeric"]("", "5") == REWARDS["numeric"]("nan", "nan") == 0.0


@pytest.mark.parametrize(
    ("said", "true"),
    [("42", "42.0"), ("-3", "-3.0"), ("007", "7"), (".5", "0.5"), ("3e5", "300000"), ("5.", "5"), ("$5", "5")]
    + [("1/2", "0.5"), ("\\frac{1}{2}", ".5"), ("-\\frac{3}{4}", "-0.75"), ("\\dfrac{1}{2}", "1/2")]
    + [("0.333333", "1/3"), ("1,234,567", "1234567"), ("1,000.5", "1000.5")]
    + [("50%", "0.5"), ("50\\%", "1/2"), ("50", "50%"), ("5e1%", "50%")]
    + [("\\boxed{\\frac{3}{4}}", "0.75"), ("so $\\boxed{12}$ it is", "12"), ("$\\frac{1}{2}$", "50%")]
    + [("Blue.", "blue"), ("x + 1", "x + 1")],
)
def test_numbers_fractions_and_percentages_are_the_same_however_they_are_written(said, true):
    assert REWARDS["math"](answered(said), true) == REWARDS["math"](answered(true), said) == 1.0


@pytest.mark.parametrize(
    ("said", "true"),
    [("42", "43"), ("1000000", "1000001"), ("1000.001", "1000.002"), ("0.33", "1/3"), ("1e-7", "2e-7"), ("5", "5.1")]
    + [("1/0", "0"), ("0/0", "0"), ("1//2", "0"), ("1/2/3", "1/6"), ("1 1/2", "5.5"), ("1\\frac{1}{2}", "5.5")]
    + [("5%", "50%"), ("5%", "500%"), ("50%", "0.005"), ("1,2", "12"), ("1.2.3", "1.2"), ("", "5"), ("...", "0")]
    + [("nan", "inf"), ("1e999", "2e999"), ("3 apples", "4 apples"), ("2x", "2"), ("2:3", "3"), ("5 or 6", "5")]
    + [("9^9^9^9^9", "1"), ("(-8)^0.5", "2"), ("()", "0"), ("(" * 60 + "1" + ")" * 60, "1"), ("x =", "y =")]
    + [("0" * 300 + "5", "5")],
)
def test_numbers_that_differ_and_texts_that_are_no_numbers_are_not_the_same(said, true):
    assert REWARDS["math"](answered(said), true) == REWARDS["math"](answered(true), said) == 0.0
    assert not same_value(said, true)


def test_a_percentage_has_the_value_that_its_sign_is_given():
    assert plain_number("50%") == 0.5 and plain_number("50\\%", percent=1.0) == 50.0
    assert plain_number("3 apples") is plain_number("1/2/3") is plain_number("nan") is None


def test_math_verify_is_asked_the_truth_first_about_short_formulas_on_the_main_thread_alone(monkeypatch):
    asked = []
    double = types.SimpleNamespace(
        parse=lambda text, parsing_timeout: text,
        verify=lambda gold, said, timeout_seconds: bool(asked.append((gold, said))) or "2a" in said,
    )
    monkeypatch.setitem(sys.modules, "math_verify", double)
    assert REWARDS["math"](answered("a + A"), "2a") == 0.0 and REWARDS["math"](answered("2a"), "a + a") == 1.0
    assert asked == [("$2a$", "$a + a$"), ("$a + a$", "$2a$")]
    assert REWARDS["default"]("2a", "the sum + 1") == 1.0 and REWARDS["math"](answered("2a" * 200), "a + 1") == 0.0
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(REWARDS["math"], answered("2a"), "a + a").result() == 0.0
    assert len(asked) == 3
    # Numbers are compared by hand, and words are no formulas: to math_verify both are l * i * s * t * e * n.
    assert REWARDS["math"]("2", "3") == REWARDS["math"]("silent", "listen") == 0.0 and len(asked) == 3
    for marked in ("$2a$", "\\(2a\\)", "\\boxed{2a}", "the sum $2a$"):
        assert REWARDS["math"](marked, "a + a") == 1.0 and asked[-1][1] == marked


@pytest.mark.parametrize(
    ("said", "true", "expected"),
    [
        ("2\\sqrt{3}", "\\sqrt{12}", 1),
        ("x^2+2x+1", "(x+1)^2", 1),
        ("\\boxed{x+1}", "1 + x", 1),
        ("\\{1,2\\}", "\\{2,1\\}", 1),
    ]
    + [("2 + 3 \\times 4", "14", 1), ("90^\\circ", "90", 1), ("5 cm", "5", 1), ("x = 5", "5", 1), ("3 apples", "3", 1)]
    + [("The answer is $2\\sqrt{3}$.", "\\sqrt{12}", 1), ("\\dfrac12", "1/2", 1), ("9^9^9^9^9", "x+1", 0)]
    + [
        ("2", "2\\pi", 0),
        ("2", "2x", 0),
        ("2", "2\\sqrt{3}", 0),
    ],  # VLM-R1: 1, as it passes formulas without dollar signs
)
def test_formulas_are_compared_by_math_verify_itself(monkeypatch, said, true, expected):
    monkeypatch.undo()
    pytest.importorskip("math_verify")
    assert REWARDS["math"](answered(said), true) == expected
    assert check_truth("math", true) == ""


def test_a_truth_that_only_math_verify_can_compare_is_reported_if_it_is_missing(monkeypatch):
    for truth in ("42", "1/2", "50%", "\\boxed{\\frac{1}{2}}", "<answer> 5 </answer>", "blue", "B"):
        assert check_truth("math", truth) == ""
    for truth in ("x+1", "2\\sqrt{3}", "5 cm", "(1, 2)"):
        assert f"the truth {truth!r} is not a plain number" in check_truth("math", truth)
        assert check_truth("math", truth).endswith("pip install math-verify")
        assert check_truth("default", truth) == check_truth("iou", truth) == check_truth("mine.py:own", truth) == ""
    monkeypatch.setitem(sys.modules, "math_verify", types.SimpleNamespace(__spec__="a double"))
    assert check_truth("math", "x+1") == ""
    assert "the truth has 401 characters" in check_truth("math", "x+" * 200 + "1")
