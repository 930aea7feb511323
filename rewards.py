"""Rewards: text in, number out.

A reward is a function of (completion, answer), the text the model wrote and the truth as the data set states it, and
has one line in REWARDS. None raises, none returns NaN, each takes time linear in the completion: where VLM-R1 uses
regular expressions with several `.*` (20 s for 1,000 characters of a truncated list), `str.find` does the same here.

Left out: a judge that is itself a model (write it as a plugin, see load_reward), and image sizes (vlm.py moves the true
boxes into the space the model answers in, so that truth and answer are compared as they stand).

A box is [x1, y1, x2, y2]. An item is (box, label): box is None where the text had no four numbers, label is None where
it had none. P, T: the number of items predicted and true.
"""

import ast
import faulthandler
import functools
import importlib.util
import itertools
import json
import math
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import add, mul, neg, pos, pow, sub, truediv
from pathlib import Path

import numpy as np

Item = tuple[list[float] | None, str | float | None]
Reward = Callable[[str, str], float]

# Possessive quantifiers (`++`) do not backtrack, and a match that starts at a bracket cannot run past the next one, so
# a search reads every character a bounded number of times.
_NUMBER = r"([-+]?(?:\d++(?:\.\d*+)?|\.\d++)(?:[eE][-+]?\d++)?|[-+]?(?i:nan|infinity|inf))"
_PAIR = rf"{_NUMBER}\s*+,\s*+{_NUMBER}"
_BOX = re.compile(rf"\[\s*+{_PAIR}\s*+,\s*+{_PAIR}\s*+\]")
_POINT = re.compile(rf"[\[(]\s*+{_PAIR}(?:\s*+,\s*+{_PAIR})?\s*+[\])]")
_THINK_TO_ANSWER = re.compile(r"</think>\s*+<answer>")

IOU_THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).tolist())  # as COCO has them, rounding included
RECALL_POINTS = np.linspace(0.0, 1.0, 101)
MAX_DETECTIONS = 100  # per class, COCO's limit
MAX_AREA = 1e10  # COCO leaves an unmatched box out of the count if its area is larger than this or negative
MAX_DEPTH = 100  # of nested JSON; json.loads itself gives up near 1,000 by exhausting the stack
MAX_COMPARED = 4_000  # characters, as comparing costs length x length / 64
MAX_EXPRESSION = 200  # characters of a mathematical answer
COSINE_LENGTH = 1_024  # tokens over which cosine_length falls, as in VLM-R1
WATCHDOG_SECONDS = 30  # after its time limit, a reward that cannot be interrupted ends the process
OVERLONG = (768, 1_024)  # tokens between which soft_overlong falls


def blocks(text: str, start: str, end: str) -> list[str]:
    """The texts between each start tag and the next end tag, from left to right without overlap."""
    found, position = [], 0
    while (left := text.find(start, position)) >= 0 and (right := text.find(end, left + len(start))) >= 0:
        found.append(text[left + len(start) : right])
        position = right + len(end)
    return found


def answer_text(text: str, which: int) -> str | None:
    """The content of the first (0) or last (-1) answer tags, None where there are none."""
    answers = blocks(text, "<answer>", "</answer>")
    return answers[which].strip() if answers else None


def answer_or_all(text: str, which: int) -> str:
    """The content of the first (0) or last (-1) answer tags, the whole text where there are none."""
    answer = answer_text(text, which)
    return text.strip() if answer is None else answer


def clean_text(text: str) -> str:
    """The last answer in lower case on one line, without full stops at its end."""
    answers = blocks(text, "<answer>", "</answer>")
    text = re.sub(r"(?<=\s)[\r\n]", "", answers[-1] if answers else text)
    return re.sub(r"[\r\n]", " ", text).strip().rstrip(".").lower()


def count_tokens(text: str) -> int:
    """About how many tokens a text has: words (long ones by eight letters), digits, signs and line breaks."""
    return len(re.findall(r"[^\W\d_]{1,8}|\S|\n", text))  # VLM-R1 asks its tokenizer, which a reward does not have


def parse_json(text: str):
    """The value of a JSON text, None where it is not JSON or nested too deeply."""
    brackets = re.findall(r"[][{}]", text)
    depths = itertools.accumulate(1 if bracket in "[{" else -1 for bracket in brackets)
    if len(brackets) > MAX_DEPTH and max(depths) > MAX_DEPTH:
        return None
    try:
        return json.loads(text, parse_int=float)  # int refuses more than 4,300 digits
    except ValueError:
        return None


def first_box(text: str, anywhere: bool = False) -> list[float] | None:
    """The first box of the first answer (anywhere: or of an untagged text), None without one or if it is not finite."""
    # VLM-R1 reads non-negative integers without spaces before the commas, and the last box when it evaluates.
    answer = answer_or_all(text, 0) if anywhere else answer_text(text, 0)
    match = _BOX.search(answer) if answer else None
    box = [float(number) for number in match.groups()] if match else None
    return box if box and all(map(math.isfinite, box)) else None


def parse_boxes(text: str, which: int = -1, bare: bool = True) -> list[Item] | None:
    """The items in the first (0) or last (-1) fence of the last answer, [] for "None", None for what cannot be read.

    A text without answer tags is read as a whole; a list without a fence is read if bare.
    """
    answer = answer_or_all(text, -1)
    fences = blocks(answer, "```json", "```")
    listed = fences[which].strip() if fences else answer
    if listed.rstrip(".").lower() == "none":
        return []
    values = parse_json(listed)
    readable = isinstance(values, list) and (fences or bare or not values)
    return [_item(value) for value in values] if readable else None


def _item(value: object) -> Item:
    if not isinstance(value, dict):
        return None, None
    box, label = value.get("bbox_2d"), value.get("label")
    whole = isinstance(box, list) and len(box) >= 4 and set(map(type, box[:4])) <= {float, bool}
    return [float(x) for x in box[:4]] if whole else None, label if isinstance(label, str | float) else None


_parse_truth = functools.lru_cache(maxsize=1024)(parse_boxes)  # the completions of a group share one truth


def _areas(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """The areas of overlap, union and enclosing box of two boxes, zeros where a coordinate is not finite."""
    if not all(map(math.isfinite, (*a, *b))):
        return 0.0, 0.0, 0.0
    overlap = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = sum(max(x2 - x1, 0) * max(y2 - y1, 0) for x1, y1, x2, y2 in (a, b)) - overlap
    x, y = (a[0], a[2], b[0], b[2]), (a[1], a[3], b[1], b[3])
    return overlap, union, (max(x) - min(x)) * (max(y) - min(y))


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes, 0 where one of them is empty, inverted or not finite."""
    # VLM-R1 takes one from the lower right corners and adds it again: there an overlap of up to one pixel is none.
    overlap, union, _ = _areas(a, b)
    return overlap / union if 0 < union < math.inf else 0.0


def giou(a: Sequence[float], b: Sequence[float]) -> float:
    """IoU less the share of the enclosing box that neither fills (arXiv 1902.09630), -1 where a box is not finite."""
    _, union, hull = _areas(a, b)
    return iou(a, b) - (hull - min(union, hull)) / hull if 0 < hull < math.inf else -1.0


def box_ious(
    predicted: Sequence[Sequence[float]],  # [P, 4]
    true: Sequence[Sequence[float]],  # [T, 4]
) -> np.ndarray:
    """The IoU of every predicted with every true box, [P, T]."""
    # Corners are recomputed from width and height, as in COCO, so that a pair on a threshold falls on the same side.
    p, t = np.array(predicted, float).reshape(-1, 1, 4), np.array(true, float).reshape(1, -1, 4)
    with np.errstate(all="ignore"):  # what is not finite is set to 0 below
        p_size, t_size = p[..., 2:] - p[..., :2], t[..., 2:] - t[..., :2]
        sides = np.minimum(p[..., :2] + p_size, t[..., :2] + t_size) - np.maximum(p[..., :2], t[..., :2])  # [P, T, 2]
        overlap = np.maximum(sides[..., 0], 0) * np.maximum(sides[..., 1], 0)
        union = p_size[..., 0] * p_size[..., 1] + t_size[..., 0] * t_size[..., 1] - overlap
        return np.where((overlap > 0) & (union < np.inf), overlap / union, 0.0)


def average_precision(
    predicted: Sequence[Item],  # [P], the surest first
    true: Sequence[Item],  # [T]
    thresholds: Sequence[float] = IOU_THRESHOLDS,
) -> float:
    """COCO's AP of one image: the mean precision over true classes, thresholds and 101 recalls; 0 without truth."""
    # Boxes of other classes cost nothing, in COCO too: the loophole that od_length closes (arXiv 2504.07615, 4.3).
    true = [(box, label) for box, label in true if box and _counts(box)]
    classes = {label: k for k, label in enumerate(dict.fromkeys(label for _, label in true))}
    wanted, found, seen = [classes[label] for _, label in true], [], [0] * len(classes)
    for box, label in predicted:
        if box and label in classes and seen[classes[label]] < MAX_DETECTIONS:
            found.append((box, classes[label]))
            seen[classes[label]] += 1
    ious = box_ious([box for box, _ in found], [box for box, _ in true])
    same = np.equal.outer([k for _, k in found], wanted)  # [P, T]
    rows = [(k, _counts(box), []) for box, k in found]
    for p, t in np.argwhere(same & (ious >= min(thresholds))).tolist():
        rows[p][2].append((float(ious[p, t]), t))
    totals, scores = [wanted.count(k) for k in classes.values()], []
    for threshold in thresholds:
        scores += map(_mean_precision, _hit_ranks(rows, len(classes), threshold), totals)
    return sum(scores) / len(scores) if scores else 0.0


def _counts(box: Sequence[float]) -> bool:
    """Whether COCO counts a box that matches nothing; one that is not finite always counts, as wrong."""
    return 0 <= (box[2] - box[0]) * (box[3] - box[1]) <= MAX_AREA or not all(map(math.isfinite, box))


def _hit_ranks(rows: list[tuple[int, bool, list]], num_classes: int, threshold: float) -> list[list[int]]:
    """The ranks of the hits within each class: each prediction takes the best true box left, of equals the last."""
    # A row has the class, whether the prediction counts without a hit, and the (IoU, t) of the boxes it may take.
    taken, rank, ranks = set(), [0] * num_classes, [[] for _ in range(num_classes)]
    for k, counts, candidates in rows:
        best, chosen = threshold, None
        for overlap, t in candidates:
            if overlap >= best and t not in taken:
                best, chosen = overlap, t
        rank[k] += counts or chosen is not None
        if chosen is not None:
            taken.add(chosen)
            ranks[k].append(rank[k])
    return ranks


def _mean_precision(ranks: list[int], num_true: int) -> float:
    """The mean over 101 recalls of the best precision at that recall or a higher one."""
    weights, best, total = _recall_weights(num_true), 0.0, 0.0
    for k in range(len(ranks), 0, -1):
        best = max(best, k / ranks[k - 1])
        total += weights[k] * best
    return (total + weights[0] * best) / len(RECALL_POINTS)


@functools.cache
def _recall_weights(num_true: int) -> list[int]:
    """How many of the 101 recalls are first reached by the k-th hit, for k from 0 to num_true."""
    needed = np.searchsorted(np.arange(num_true + 1) / num_true, RECALL_POINTS)
    return np.bincount(needed, minlength=num_true + 1).tolist()


def greedy_matches(
    ious: np.ndarray,  # [P, T]
    floor: float = 0.5,
) -> list[tuple[int, int]]:
    """The pairs (p, t) of a one-to-one matching that takes the best pair left until none reaches the floor."""
    pairs = np.argwhere(ious >= floor)
    order = np.argsort(-ious[pairs[:, 0], pairs[:, 1]], kind="stable")
    matches: dict[int, int] = {}
    taken: set[int] = set()
    for p, t in pairs[order].tolist():
        if p not in matches and t not in taken:
            matches[p] = t
            taken.add(t)
    return list(matches.items())


def _f1(predicted: list[Item], true: list[Item]) -> float:
    """The mean over COCO's thresholds of F1 under one matching, which admits no pair with different labels."""
    ious, same = _comparison(predicted, true)
    overlaps = [float(ious[pair]) for pair in greedy_matches(np.where(same, ious, 0.0))]
    # The best pairs are taken first, so the matching at a higher threshold is the beginning of the one at 0.5.
    hits = sum(overlap >= threshold for overlap in overlaps for threshold in IOU_THRESHOLDS)
    return 2 * hits / len(IOU_THRESHOLDS) / (len(predicted) + len(true))


def _weighted_score(predicted: list[Item], true: list[Item]) -> float:
    """0.7 x the matched IoU per true box (0 for a wrong label) + 0.3 x completeness, VLM-R1's detection_score."""
    ious, same = _comparison(predicted, true)
    matches = greedy_matches(ious)
    position = sum(float(ious[pair]) for pair in matches if same[pair]) / len(true)
    missed, false_alarms = 1 - len(matches) / len(true), 1 - len(matches) / len(predicted)
    return min(0.7 * position + 0.3 * (1 - (missed + false_alarms) / 2), 1.0)


def _comparison(predicted: list[Item], true: list[Item]) -> tuple[np.ndarray, np.ndarray]:
    """The IoUs of the items that have boxes, and whether their labels are the same in lower case, both [P, T]."""
    found, wanted = [item for item in predicted if item[0]], [item for item in true if item[0]]
    a, b = (["" if label is None else str(label).lower() for _, label in items] for items in (found, wanted))
    same = np.array([[x == y for y in b] for x in a], bool).reshape(len(a), len(b))
    return box_ious([box for box, _ in found], [box for box, _ in wanted]), same


def _detection(
    score: Callable[[list[Item], list[Item]], float], completion: str, answer: str, which: int = -1, tagged: bool = True
) -> float:
    """The score of the items of a completion against the true ones; where a side is empty, 1 if both are else 0."""
    # VLM-R1 takes an answer it cannot read for an empty list, so it pays 1 for garbage where the truth is "None".
    true, predicted = _parse_truth(answer, which), parse_boxes(completion, which, bare=False)
    if true is None or predicted is None or (tagged and answer_text(completion, -1) is None):
        return 0.0
    return score(predicted, true) if predicted and true else float(predicted == true)


# VLM-R1's choice is a letter before a sign or the end. Where there is none, (A), A), [A], **A** and <b>A</b> are too.
_CHOICE = re.compile(r"(?<![A-Z])[A-Z](?=[.,?!:;]|$)")
_MARKED_CHOICE = re.compile(r"(?<![\w'])(?<!\w[(\[])[A-Z](?=[)\]}*_\"<”）】。，：；！？、])")
_CHOICE_WORDS = "答案 选择 正确 是 对 ANSWER CORRECT CHOOSE SELECT RIGHT 认为 应该 觉得 THINK BELIEVE SHOULD".split()


def find_choice(text: str) -> str | None:
    """The letter that an answer to a multiple-choice question chooses, None if it chooses none."""
    text = " ".join(text.upper().split())
    letters = Counter(_CHOICE.findall(text) or _MARKED_CHOICE.findall(text))
    return max(letters, key=lambda letter: letters[letter] * _choice_points(text, letter)) if letters else None


def _choice_points(text: str, letter: str) -> int:
    """VLM-R1's points for what surrounds the first place of a letter in a text."""
    place = text.find(letter)
    points = sum(word in text[max(0, place - 20) : place + 20] for word in _CHOICE_WORDS)
    return points + 2 * (place > 0.7 * len(text)) + (text[place + 1 : place + 2] in tuple("。.!！,，"))


def similarity(a: str, b: str) -> float:
    """Twice the longest common subsequence over both lengths, as Levenshtein.ratio; 0 for long texts that differ."""
    if a == b or max(len(a), len(b)) > MAX_COMPARED:
        return float(a == b)
    # One bit per character of a (Hyyrö 2004): len(b) additions of integers of len(a) bits.
    places: dict[str, int] = {}
    for i, character in enumerate(a):
        places[character] = places.get(character, 0) | 1 << i
    everything = unmatched = (1 << len(a)) - 1
    for character in b:
        hits = unmatched & places.get(character, 0)
        unmatched = ((unmatched + hits) | (unmatched - hits)) & everything
    return 2 * (len(a) - unmatched.bit_count()) / (len(a) + len(b))


_UNIT = r"\s*(?:[cmk]?m|k?g|m?l|m?s|h|px|deg|min|sec)\b(?:/[hs]\b)?|\s+[a-z]{2,}(?:\s+[a-z]{2,})*"
_REWRITES = [  # from LaTeX and prose to arithmetic, in this order
    (r"\\(?:text|mathrm)\{[^{}]*\}|\\(?:left|right|[,;! ])|\^\\circ|\^\{\\circ\}|[$€£¥°]|\\(?=[%$])", ""),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"(?:\\sqrt|√)\s*(\d+)", r"\\sqrt{\1}"),
    (r"\\pi|π", f"({math.pi})"),
    (r"\\times|\\cdot|×", "*"),
    (r"\s*\bper ?cent$", "%"),
    (r"(?<=\d),(?=\d{3}(?!\d))", ""),  # thousands
    (rf"(?<=[\d)}}])(?:{_UNIT})(?:\^?\{{?[23]\}}?|[²³])?$", ""),
    (r"(?<=\d)\s+(?=\d+\s*/)|(?<=\d)\s*(?=\\frac)", "+"),  # 1 1/2
    (r"\^", "**"),
]
_FUNCTIONS = [(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))"), (r"\\sqrt\{([^{}]*)\}", r"((\1)**0.5)")]
_ARITHMETIC = re.compile(r"(?:\d[\d.]*+(?:e[-+]?\d++)?|\.\d++|[-+*/()\s])++")
_OPERATORS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv, ast.Pow: pow, ast.USub: neg, ast.UAdd: pos}


def statement(text: str) -> str:
    """What a mathematical answer states: the content of its last \\boxed, or what follows "is", ":" or its only "="."""
    start = text.rfind("\\boxed{")
    if start >= 0:
        body = text[start + 7 : start + 8 + MAX_EXPRESSION]
        depths = itertools.accumulate((c == "{") - (c == "}") for c in body)
        end = next((i for i, depth in enumerate(depths) if depth < 0), None)
        text = text if end is None else body[:end]
    tail = text[-2 * MAX_EXPRESSION :]
    ends = r"\b(?:is|are|equals)\b|(?<=[a-z]):" + "|=" * (tail.count("=") == 1)
    return re.split(ends, tail)[-1].strip().rstrip(".")


def evaluate(text: str) -> tuple[float, bool] | None:
    """The number that an expression in lower case is and whether it is in percent, None if it is no arithmetic."""
    if len(text) > MAX_EXPRESSION:
        return None
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text)
    percent, text, previous = text.endswith("%"), text.removesuffix("%").strip(), None
    while text != previous:  # from the innermost braces outwards
        previous = text
        for pattern, replacement in _FUNCTIONS:
            text = re.sub(pattern, replacement, text)
    text = re.sub(r"(?<=[\d)])\s*(?=\()", "*", text.replace("{", "(").replace("}", ")"))
    text = re.sub(r"(?<![\d.])0++(?=\d)", "", text)
    if not _ARITHMETIC.fullmatch(text) or text.count("(") > 20:
        return None
    try:
        value = _arithmetic(ast.parse(text, mode="eval").body)
    except (SyntaxError, ArithmeticError, KeyError, AttributeError):
        return None
    return (value, percent) if isinstance(value, float) and math.isfinite(value) else None


def _arithmetic(node: ast.expr) -> float:
    if isinstance(node, ast.Constant):
        return float(node.value)
    if isinstance(node, ast.UnaryOp):
        return _OPERATORS[type(node.op)](_arithmetic(node.operand))
    return _OPERATORS[type(node.op)](_arithmetic(node.left), _arithmetic(node.right))


def same_value(predicted: str, true: str) -> bool:
    """Whether two texts state the same number to six decimals; 50% is 0.5 and, where only one side says percent, 50."""
    a, b = evaluate(statement(predicted.lower())), evaluate(statement(true.lower()))
    if a is None or b is None:
        return False
    pairs = [(a[0] / (s if a[1] else 1), b[0] / (s if b[1] else 1)) for s in ((1, 100) if a[1] != b[1] else (1,))]
    return any(
        math.isclose(x, y, rel_tol=1e-14) or abs(x - y) <= min(5e-7, 1e-5 * max(abs(x), abs(y))) for x, y in pairs
    )


def verified(predicted: str, true: str) -> bool:
    """Whether math_verify, where it is installed, finds two short texts equal."""
    # Its time limit is a signal, which only the main thread may set; without a limit a tower of powers would never end.
    if max(len(predicted), len(true)) > MAX_EXPRESSION or threading.current_thread() is not threading.main_thread():
        return False
    try:
        from math_verify import parse, verify
    except ImportError:
        return False
    return bool(verify(parse(true, parsing_timeout=1), parse(predicted, parsing_timeout=1), timeout_seconds=1))


def iou_reward(completion: str, answer: str) -> float:
    """The IoU of the first box of the first answer with the true box."""
    predicted, true = first_box(completion), first_box(answer, anywhere=True)
    return iou(predicted, true) if predicted and true else 0.0


def giou_reward(completion: str, answer: str) -> float:
    """The same with GIoU, from -1 to 1; no box is worth 0, so pair it with rec_format."""
    predicted, true = first_box(completion), first_box(answer, anywhere=True)
    return giou(predicted, true) if predicted and true else 0.0


def rec_format(completion: str, answer: str) -> float:
    """1 for a thought and then an answer with a box inside braces, whatever stands before and after."""
    # VLM-R1 searches <think>.*?</think>\s*<answer>.*?\{.*\[box\].*\}.*?</answer> with four non-negative integers.
    # The first place of each left part and the last of each right one leave the box most room: no other need be tried.
    thought = completion.find("<think>")
    tags = _THINK_TO_ANSWER.search(completion, thought + 7) if thought >= 0 else None
    left = completion.find("{", tags.end()) if tags else -1
    right = completion.rfind("}", 0, max(completion.rfind("</answer>"), 0))
    boxes = _BOX.findall(completion, left, right) if left >= 0 else []
    return float(any(all(math.isfinite(float(x)) for x in box) for box in boxes))


def format_reward(completion: str, answer: str) -> float:
    """1 for exactly a thought and an answer, either of them possibly empty, with only white space in between."""
    # VLM-R1 matches all of <think>.*?</think>\s*<answer>.*?</answer>; a line break at the end fails there and here.
    tags = _THINK_TO_ANSWER.search(completion, 7) if completion.startswith("<think>") else None
    return float(tags is not None and completion.endswith("</answer>"))


def od_ap(completion: str, answer: str) -> float:
    """COCO's AP of the boxes in the last fence of the last answer."""
    return _detection(average_precision, completion, answer)


def od_ap50(completion: str, answer: str) -> float:
    """The same at IoU 0.5 alone."""
    return _detection(lambda predicted, true: average_precision(predicted, true, [0.5]), completion, answer)


def od_length(completion: str, answer: str) -> float:
    """AP x min(1, true boxes / predicted boxes), VLM-R1's odLength."""
    return _detection(lambda p, t: average_precision(p, t) * min(1.0, len(t) / len(p)), completion, answer)


def od_f1(completion: str, answer: str) -> float:
    """F1 of labelled boxes averaged over IoU 0.5 to 0.95: duplicates, wrong labels and absent classes cost."""
    return _detection(_f1, completion, answer)


def weighted_sum(completion: str, answer: str) -> float:
    """VLM-R1's weighted sum of position and completeness, of the first fence, with or without answer tags."""
    return _detection(_weighted_score, completion, answer, which=0, tagged=False)


def point_in_box(completion: str, answer: str) -> float:
    """1 if the first point (or the centre of the first box) of the first answer is in the true box or on its edge."""
    match, true = _POINT.search(answer_text(completion, 0) or ""), first_box(answer, anywhere=True)
    if not match or not true:
        return 0.0
    numbers = [float(number) for number in match.groups() if number is not None]
    x, y = (sum(numbers[i::2]) / len(numbers[i::2]) for i in (0, 1))
    return float(true[0] <= x <= true[2] and true[1] <= y <= true[3])


def mcq(completion: str, answer: str) -> float:
    """1 if the first answer chooses the true letter."""
    true = find_choice(answer_or_all(answer, 0))
    return float(true is not None and find_choice(answer_or_all(completion, 0)) == true)


def yes_no(completion: str, answer: str) -> float:
    """1 if the first yes or no of the first answer is that of the truth."""
    # VLM-R1 also finds "no" in "know" and "yes" in "eyes", and pays 1 where neither side says either.
    said, true = (re.search(r"\b(?:yes|no)\b", answer_or_all(text.lower(), 0)) for text in (completion, answer))
    return float(bool(said and true) and said[0] == true[0])


def numeric(completion: str, answer: str) -> float:
    """1 if the last answer is nothing but a number and equal to the true one."""
    numbers = _floats(clean_text(completion), clean_text(answer))
    return float(bool(numbers) and numbers[0] == numbers[1])


def _floats(*texts: str) -> list[float] | None:
    try:
        return [float(text) for text in texts]
    except ValueError:
        return None


def math_reward(completion: str, answer: str) -> float:
    """1 if the last answer equals the truth as a text, a number or, where math_verify is installed, a formula."""
    predicted, true = clean_text(completion), clean_text(answer)
    said, wanted = ("".join(statement(text).split()) for text in (predicted, true))
    same = predicted == true or (wanted != "" and said == wanted) or same_value(predicted, true)
    return float(same or verified(predicted, true))


def all_match(completion: str, answer: str) -> float:
    """1 if the last answer is the truth, apart from case, line breaks and full stops at the end."""
    return float(clean_text(completion) == clean_text(answer))


def default(completion: str, answer: str) -> float:
    """VLM-R1's reward for any text: the same number, else the same choice, else how similar the texts are."""
    predicted, true = answer_or_all(completion, -1), answer_or_all(answer, 0)
    if same_value(predicted, true) or verified(predicted, true):
        return 1.0
    has_digits = re.search(r"\d", true) is not None
    if has_digits and (numbers := _floats(clean_text(predicted), clean_text(true))):
        return float(numbers[0] == numbers[1])
    if not has_digits and (choice := find_choice(true)):
        return float(find_choice(predicted) == choice)
    return similarity(clean_text(predicted), clean_text(true))


def accuracy(completion: str, answer: str) -> float:
    """How right an answer is: by iou if the truth is a box, by weighted_sum if it lists items, else by default."""
    true = answer_or_all(answer, 0)
    if _BOX.fullmatch(true):
        return iou_reward(completion, answer)
    return default(completion, answer) if _parse_truth(true) is None else weighted_sum(completion, answer)


def cosine_length(completion: str, answer: str) -> float:
    """From 1 down to 0.5 for a right answer (accuracy 0.7 or more), from 0 to -0.5 for a wrong one, by 1,024 tokens."""
    # arXiv 2502.03373. VLM-R1 takes every answer for right and rises again after 1,024 tokens, to full marks at 2,048.
    fallen = (1 - math.cos(math.pi * min(count_tokens(completion) / COSINE_LENGTH, 1.0))) / 4
    return float(accuracy(completion, answer) >= 0.7) - fallen


def repetition(completion: str, answer: str) -> float:
    """Minus the share of items that repeat another in a list of boxes, else of runs of six words in the whole text."""
    values = _listed(completion)
    if values:
        items = [value for value in values if isinstance(value, dict) and "bbox_2d" in value and "label" in value]
        units = [f"{item['bbox_2d']}_{item['label']}" for item in items]
    else:
        words = completion.lower().split()
        units = list(zip(*(words[i:] for i in range(6)), strict=False))
    return len(set(units)) / len(units) - 1 if units else 0.0


def _listed(text: str) -> list | None:
    """The list in the first json fence, else in the first fence, else the first list of labelled boxes."""
    fences = blocks(text, "```json", "```") or blocks(text, "```", "```")
    listed = fences[0].strip() if fences and fences[0].strip() else _labelled_list(text)
    values = parse_json(listed)
    if values is None:  # broken JSON: the objects that are whole, where VLM-R1 needs json_repair
        parts = [part for part in re.findall(r"\{[^{}]*\}", listed) if '"bbox_2d"' in part and '"label"' in part]
        values = [value for part in parts if (value := parse_json(part))]
    return values if isinstance(values, list) else None


def _labelled_list(text: str) -> str:
    """The first list of objects in which a box comes before a label, an empty text if there is none."""
    start = re.search(r"\[\s*+\{", text)
    box = text.find('"bbox_2d"', start.end()) if start else -1
    label = text.find('"label"', box) if box >= 0 else -1
    end = re.compile(r"\}\s*+\]").search(text, label) if label >= 0 else None
    return text[start.start() : end.end()] if end else ""


def soft_overlong(completion: str, answer: str) -> float:
    """0 up to 768 tokens, -1 from 1,024 on, and a straight line between (DAPO, arXiv 2503.14476, equation 13)."""
    return -min(max((count_tokens(completion) - OVERLONG[0]) / (OVERLONG[1] - OVERLONG[0]), 0.0), 1.0)


REWARDS: dict[str, Reward] = {
    "iou": iou_reward,
    "giou": giou_reward,
    "rec_format": rec_format,
    "format": format_reward,
    "od_ap": od_ap,
    "od_ap50": od_ap50,
    "od_length": od_length,
    "od_f1": od_f1,
    "weighted_sum": weighted_sum,
    "point_in_box": point_in_box,
    "mcq": mcq,
    "yes_no": yes_no,
    "numeric": numeric,
    "math": math_reward,
    "all_match": all_match,
    "default": default,
    "cosine_length": cosine_length,
    "repetition": repetition,
    "soft_overlong": soft_overlong,
}

# The rewards whose truth is made of boxes, which vlm.py moves into the model's space. Not cosine_length: it takes
# whatever truth the reward beside it takes.
BOX_REWARDS = frozenset({"iou", "giou", "od_ap", "od_ap50", "od_length", "od_f1", "weighted_sum", "point_in_box"})


def reads_boxes(spec: str) -> bool:
    """Whether a bare list of four numbers is a box to this reward; a plugin is assumed to read boxes."""
    return spec in BOX_REWARDS or ":" in spec


REWARD_RANGES: dict[str, tuple[float, float]] = {name: (0.0, 1.0) for name in REWARDS} | {
    "giou": (-1.0, 1.0),
    "cosine_length": (-0.5, 1.0),
    "repetition": (-1.0, 0.0),
    "soft_overlong": (-1.0, 0.0),
}


@functools.cache
def load_reward(spec: str) -> Reward:
    """The reward of that name, or the function that "path/to/file.py:function" names."""
    if spec in REWARDS:
        return REWARDS[spec]
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py"):
        raise ValueError(
            f"reward {spec!r} is unknown; choose from {', '.join(REWARDS)} or name yours as file.py:function"
        )
    if not Path(path).is_file():
        raise ValueError(f"reward {spec!r}: there is no file {path!r} under {Path.cwd()}; correct the path")
    file = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(
            f"reward {spec!r}: {path} has no function {name!r}; define it as (completion, answer) -> float"
        )
    return function


# ---- rewards of one's own, which may do anything -------------------------------------------------------------------


class RewardTimeout(BaseException):
    """Not an Exception, so that an `except Exception` inside the reward does not swallow it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises RewardTimeout within a block that takes longer; on the main thread alone, and not with 0.

    The signal is heard between two instructions of Python. A call into C that never comes back does not hear it: then
    the watchdog prints where it hangs and ends the process, which brings the other ranks down.
    """
    if seconds <= 0 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise RewardTimeout

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds + WATCHDOG_SECONDS, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


def checked_reward(spec: str, completion: str, answer: str, seconds: float) -> tuple[float, str]:
    """(value, ""); or (0, what went wrong) where the reward raises, takes longer or returns no finite number."""
    function = load_reward(spec)
    try:
        with time_limit(0 if spec in REWARDS else seconds):
            value = float(function(completion, answer))
    except RewardTimeout:
        return 0.0, f"took longer than {seconds:g} s (--reward_seconds)"
    except Exception as error:  # whatever a stranger's function raises
        return 0.0, f"raised {type(error).__name__}: {error}"
    return (value, "") if math.isfinite(value) else (0.0, f"gave {value}, no finite number")
