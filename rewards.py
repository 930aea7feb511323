"""Rewards: text in, number out.

A reward is a function of (completion, answer): the text that the model wrote and the truth as the data set states it.
Each has one line in REWARDS. None raises, none returns NaN, and each takes time linear in the completion: `str.find`
does here what VLM-R1's regular expressions with several `.*` do in 20 s for 1,000 characters of a truncated list.

Left out: a judge that is itself a model (write it as a plugin, see load_reward), and image sizes (model/vlm.py moves
the true boxes into the space that the model answers in, so truth and answer are compared as they stand).

A box is [x1, y1, x2, y2]. An item is (box, label): the box is None if the text had no four numbers, the label is None
if it had none.
"""

import functools
import importlib.util
import itertools
import json
import math
import re
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from metrics.detection import Item, average_precision, detection_score, giou, iou, matched_f1

Reward = Callable[[str, str], float]

MAX_DEPTH = 100  # of nested JSON; json.loads itself gives up near 1,000 by exhausting the stack
MAX_COMPARED = 4_000  # characters of a text, since comparing costs length x length / 64
MAX_FORMULA = 200  # characters of a mathematical answer
COSINE_LENGTH = 1_024  # tokens over which cosine_length falls, as in VLM-R1
OVERLONG = (768, 1_024)  # tokens between which soft_overlong falls


# ---- reading text: tags, boxes, JSON -------------------------------------------------------------------------------

# Possessive quantifiers (`++`) do not backtrack, and a match that starts at a bracket cannot run past the next one, so
# a search reads every character a bounded number of times.
_NUMBER = r"([-+]?(?:\d++(?:\.\d*+)?|\.\d++)(?:[eE][-+]?\d++)?|[-+]?(?i:nan|infinity|inf))"
_PAIR = rf"{_NUMBER}\s*+,\s*+{_NUMBER}"
_BOX = re.compile(rf"\[\s*+{_PAIR}\s*+,\s*+{_PAIR}\s*+\]")
_POINT = re.compile(rf"[\[(]\s*+{_PAIR}(?:\s*+,\s*+{_PAIR})?\s*+[\])]")
_THINK_TO_ANSWER = re.compile(r"</think>\s*+<answer>")


def blocks(text: str, start: str, end: str) -> list[str]:
    """The texts between each start tag and the next end tag, from left to right and without overlap."""
    found, position = [], 0
    while (left := text.find(start, position)) >= 0 and (right := text.find(end, left + len(start))) >= 0:
        found.append(text[left + len(start) : right])
        position = right + len(end)
    return found


def answer_text(text: str, which: int) -> str | None:
    """The content of the first (0) or last (-1) answer tags, None if there are none."""
    answers = blocks(text, "<answer>", "</answer>")
    return answers[which].strip() if answers else None


def answer_or_all(text: str, which: int) -> str:
    """The content of the first (0) or last (-1) answer tags, the whole text if there are none."""
    answer = answer_text(text, which)
    return text.strip() if answer is None else answer


def clean_text(text: str) -> str:
    """The last answer in lower case on one line, without full stops at its end."""
    text = re.sub(r"(?<=\s)[\r\n]", "", answer_or_all(text, -1))
    return re.sub(r"[\r\n]", " ", text).rstrip(".").lower()


def count_tokens(text: str) -> int:
    """Roughly how many tokens a text has: words (eight letters each), digits, signs and line breaks."""
    return len(re.findall(r"[^\W\d_]{1,8}|\S|\n", text))  # VLM-R1 asks its tokenizer, which a reward does not have


def parse_json(text: str):
    """The value of a JSON text, None if it is not JSON or nested too deeply."""
    brackets = re.findall(r"[][{}]", text)
    depths = itertools.accumulate(1 if bracket in "[{" else -1 for bracket in brackets)
    if len(brackets) > MAX_DEPTH and max(depths) > MAX_DEPTH:
        return None
    try:
        return json.loads(text, parse_int=float)  # int refuses more than 4,300 digits
    except ValueError:
        return None


def first_box(text: str, anywhere: bool = False) -> list[float] | None:
    """The first box of the first answer, None without a finite one; `anywhere` reads a text without tags as well."""
    # VLM-R1 reads non-negative integers without spaces before the commas, and the last box when it evaluates.
    answer = answer_or_all(text, 0) if anywhere else answer_text(text, 0)
    match = _BOX.search(answer) if answer else None
    box = [float(number) for number in match.groups()] if match else None
    return box if box and all(map(math.isfinite, box)) else None


def parse_boxes(text: str, which: int = -1, bare: bool = True) -> list[Item] | None:
    """The items in the first (0) or last (-1) fence of the last answer, [] for "None", None if they cannot be read.

    A text without answer tags is read as a whole. `bare` also reads a list without a fence.
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


# ---- rewards of boxes and points -----------------------------------------------------------------------------------
def box_reward(overlap: Callable[[list[float], list[float]], float]) -> Reward:
    """The reward that measures the overlap of the first box of the first answer with the true box; 0 without a box."""

    def reward(completion: str, answer: str) -> float:
        predicted, true = first_box(completion), first_box(answer, anywhere=True)
        return overlap(predicted, true) if predicted and true else 0.0

    return reward


def point_in_box(completion: str, answer: str) -> float:
    """1 if the first point (or the centre of the first box) of the first answer is in the true box or on its edge."""
    match, true = _POINT.search(answer_text(completion, 0) or ""), first_box(answer, anywhere=True)
    if not match or not true:
        return 0.0
    numbers = [float(number) for number in match.groups() if number is not None]
    x, y = (sum(numbers[i::2]) / len(numbers[i::2]) for i in (0, 1))
    return float(true[0] <= x <= true[2] and true[1] <= y <= true[3])


def detection_reward(score: Callable[[list[Item], list[Item]], float], which: int = -1, tagged: bool = True) -> Reward:
    """The reward that scores predicted against true items; if a side is empty, it pays 1 if both are, else 0.

    It reads the first (0) or last (-1) fence of the last answer; `tagged` demands answer tags.
    """

    def reward(completion: str, answer: str) -> float:
        # VLM-R1 takes an answer that it cannot read for an empty list, so garbage earns 1 if the truth is "None".
        true, predicted = _parse_truth(answer, which), parse_boxes(completion, which, bare=False)
        if true is None or predicted is None or (tagged and answer_text(completion, -1) is None):
            return 0.0
        return score(predicted, true) if predicted and true else float(predicted == true)

    return reward


# ---- rewards of format ---------------------------------------------------------------------------------------------
def rec_format(completion: str, answer: str) -> float:
    """1 for a thought and then an answer with a box inside braces, with any text before and after."""
    # VLM-R1 searches <think>.*?</think>\s*<answer>.*?\{.*\[box\].*\}.*?</answer> with four non-negative integers.
    # The first place of each left part and the last of each right part leave the box most room: no other can match.
    thought = completion.find("<think>")
    tags = _THINK_TO_ANSWER.search(completion, thought + 7) if thought >= 0 else None
    left = completion.find("{", tags.end()) if tags else -1
    right = completion.rfind("}", 0, max(completion.rfind("</answer>"), 0))
    boxes = _BOX.findall(completion, left, right) if left >= 0 else []
    return float(any(all(math.isfinite(float(x)) for x in box) for box in boxes))


def format_reward(completion: str, answer: str) -> float:
    """1 for exactly a thought and an answer, each possibly empty, with only white space between them."""
    # VLM-R1 matches all of <think>.*?</think>\s*<answer>.*?</answer>; a line break at the end fails there and here.
    tags = _THINK_TO_ANSWER.search(completion, 7) if completion.startswith("<think>") else None
    return float(tags is not None and completion.endswith("</answer>"))


# ---- rewards of choices, yes or no, and text -----------------------------------------------------------------------
# VLM-R1's choice is a letter before a sign or the end. If there is none, (A), A), [A], **A** and <b>A</b> count too.
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


def mcq(completion: str, answer: str) -> float:
    """1 if the first answer chooses the true letter."""
    true = find_choice(answer_or_all(answer, 0))
    return float(true is not None and find_choice(answer_or_all(completion, 0)) == true)


def yes_no(completion: str, answer: str) -> float:
    """1 if the first yes or no of the first answer is the truth's."""
    # VLM-R1 also finds "no" in "know" and "yes" in "eyes", and pays 1 if neither side says either.
    said, true = (re.search(r"\b(?:yes|no)\b", answer_or_all(text.lower(), 0)) for text in (completion, answer))
    return float(bool(said and true) and said[0] == true[0])


def all_match(completion: str, answer: str) -> float:
    """1 if the last answer is the truth, apart from case, line breaks and full stops at the end."""
    return float(clean_text(completion) == clean_text(answer))


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


def default(completion: str, answer: str) -> float:
    """VLM-R1's reward for any text: the same value, else the same choice, else how similar the texts are."""
    predicted, true = answer_or_all(completion, -1), answer_or_all(answer, 0)
    if same_value(predicted, true):
        return 1.0
    has_digits = re.search(r"\d", true) is not None
    if has_digits and (numbers := _floats(clean_text(predicted), clean_text(true))):
        return float(numbers[0] == numbers[1])
    if not has_digits and (choice := find_choice(true)):
        return float(find_choice(predicted) == choice)
    return similarity(clean_text(predicted), clean_text(true))


# ---- rewards of numbers and formulas -------------------------------------------------------------------------------
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_FRACTION = re.compile(r"^([-+]?)\\[dt]?frac\{([^{}]*+)\}\{([^{}]*+)\}$")
_FORMULA_SIGN = re.compile(r"[\d\\^=+*/<>(){}\[\]]")


def numeric(completion: str, answer: str) -> float:
    """1 if the last answer is nothing but a number and equal to the true one."""
    numbers = _floats(clean_text(completion), clean_text(answer))
    return float(bool(numbers) and numbers[0] == numbers[1])


def math_reward(completion: str, answer: str) -> float:
    """1 if the last answer is the truth as a text, as a number or, with math_verify installed, as a formula."""
    predicted, true = clean_text(completion), clean_text(answer)
    return float(predicted == true or same_value(predicted, true))


def check_truth(spec: str, answer: str) -> str:
    """Why a reward cannot score completions against this truth; an empty text if it can."""
    true = clean_text(answer)
    if spec != "math" or plain_number(true) is not None or true.isalpha():  # a word is compared as a text
        return ""
    if len(true) > MAX_FORMULA:
        return f"the truth has {len(true)} characters; reward math compares formulas of up to {MAX_FORMULA}"
    if importlib.util.find_spec("math_verify"):
        return ""
    return f"the truth {true!r} is not a plain number, so reward math needs math_verify: pip install math-verify"


def same_value(predicted: str, true: str) -> bool:
    """Whether two texts are the same number to six decimals or, with math_verify installed, the same formula."""
    for percent in (0.01, 1.0):  # 50% is 0.5, and 50 to a truth of 50
        x, y = plain_number(predicted, percent), plain_number(true, percent)
        if x is None or y is None:
            return _verified(predicted, true)
        if math.isclose(x, y, rel_tol=1e-14) or abs(x - y) <= min(5e-7, 1e-5 * max(abs(x), abs(y))):
            return True
    return False


def plain_number(text: str, percent: float = 0.01) -> float | None:
    """The value of a decimal number or of a fraction of two, boxed or not; None for any other text."""
    if "\\boxed{" in text:
        text = text.rpartition("\\boxed{")[2].rsplit("}", 1)[0]
    text = text.strip("$ ").rstrip(".")
    if len(text) > MAX_FORMULA:
        return None
    unit = percent if text.endswith("%") else 1.0
    fraction = _FRACTION.sub(r"\1\2/\3", _THOUSANDS.sub("", text.rstrip("%\\")))
    parts = _floats(*fraction.split("/"))
    if parts is None or len(parts) > 2 or parts[1:] == [0.0]:
        return None
    value = unit * parts[0] / (parts[1] if len(parts) == 2 else 1.0)
    return value if math.isfinite(value) else None


def _floats(*texts: str) -> list[float] | None:
    try:
        return [float(text) for text in texts]
    except ValueError:
        return None


def _verified(predicted: str, true: str) -> bool:
    """Whether math_verify, if it is installed, finds two short formulas equal."""
    # Its time limit is a signal, which only the main thread may set; without a limit a tower of powers would never end.
    if max(len(predicted), len(true)) > MAX_FORMULA or threading.current_thread() is not threading.main_thread():
        return False
    if not _FORMULA_SIGN.search(true):  # math_verify reads a word as the product of its letters
        return False
    try:
        from math_verify import parse, verify
    except ImportError:
        return False
    # In a bare 2\sqrt{3}, as VLM-R1 passes it, math_verify reads the 2 alone, so dollar signs mark the formula.
    marked = [text if re.search(r"\$|\\[(\[]|\\boxed", text) else f"${text}$" for text in (true, predicted)]
    gold, said = (parse(text, parsing_timeout=1) for text in marked)
    return bool(verify(gold, said, timeout_seconds=1))


# ---- rewards of length and repetition ------------------------------------------------------------------------------
_LABELLED_LIST = re.compile(r'\[\s*+\{(?>.*?"bbox_2d")(?>.*?"label")(?>.*?\}\s*+\])', re.DOTALL)


def accuracy(completion: str, answer: str) -> float:
    """How right an answer is: by iou if the truth is a box, by weighted_sum if it lists items, else by default."""
    true = answer_or_all(answer, 0)
    if _BOX.fullmatch(true):
        return REWARDS["iou"](completion, answer)
    return default(completion, answer) if _parse_truth(true) is None else REWARDS["weighted_sum"](completion, answer)


def cosine_length(completion: str, answer: str) -> float:
    """From 1 down to 0.5 for a right answer (accuracy 0.7 or more), from 0 to -0.5 for a wrong one, by 1,024 tokens."""
    # arXiv 2502.03373. VLM-R1 takes every answer for right and rises again after 1,024 tokens, to full marks at 2,048.
    fallen = (1 - math.cos(math.pi * min(count_tokens(completion) / COSINE_LENGTH, 1.0))) / 4
    return float(accuracy(completion, answer) >= 0.7) - fallen


def soft_overlong(completion: str, answer: str) -> float:
    """0 up to 768 tokens, -1 from 1,024 on, and a straight line between (DAPO, arXiv 2503.14476, equation 13)."""
    return -min(max((count_tokens(completion) - OVERLONG[0]) / (OVERLONG[1] - OVERLONG[0]), 0.0), 1.0)


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
    listed = fences[0].strip() if fences else ""
    if not listed and (start := re.search(r"\[\s*+\{", text)):
        found = _LABELLED_LIST.match(text, start.start())
        listed = found[0] if found else ""
    values = parse_json(listed)
    if values is None:  # broken JSON: read the objects that are whole; VLM-R1 needs json_repair for this
        parts = [part for part in re.findall(r"\{[^{}]*\}", listed) if '"bbox_2d"' in part and '"label"' in part]
        values = [value for part in parts if (value := parse_json(part))]
    return values if isinstance(values, list) else None


# ---- the table of rewards ------------------------------------------------------------------------------------------
REWARDS: dict[str, Reward] = {
    "iou": box_reward(iou),
    "giou": box_reward(giou),  # negative for boxes far apart, 0 without a box: pair it with rec_format
    "rec_format": rec_format,
    "format": format_reward,
    "od_ap": detection_reward(average_precision),
    "od_ap50": detection_reward(lambda p, t: average_precision(p, t, [0.5])),
    "od_length": detection_reward(lambda p, t: average_precision(p, t) * min(1.0, len(t) / len(p))),
    "od_f1": detection_reward(matched_f1),  # charges duplicates, wrong labels and absent classes
    "weighted_sum": detection_reward(detection_score, which=0, tagged=False),
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

# The rewards whose truth is made of boxes, which model/vlm.py moves into the model's space. cosine_length is not among
# them: it judges by the truth of the reward beside it.
BOX_REWARDS = frozenset({"iou", "giou", "od_ap", "od_ap50", "od_length", "od_f1", "weighted_sum", "point_in_box"})


def reads_boxes(spec: str) -> bool:
    """Whether a bare list of four numbers is a box to this reward; a plugin is assumed to read boxes."""
    return spec in BOX_REWARDS or ":" in spec


@functools.cache
def load_reward(spec: str) -> Reward:
    """The reward of that name, or the function that "path/to/file.py:function" names."""
    if spec in REWARDS:
        return REWARDS[spec]
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py"):
        raise ValueError(f"reward {spec!r} is unknown: give file.py:function or one of {', '.join(REWARDS)}")
    if not Path(path).is_file():
        raise ValueError(f"reward {spec!r}: there is no file {path!r} under {Path.cwd()}; correct the path")
    file = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(file)
    try:
        file.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"reward {spec!r}: its file cannot be loaded: {reason}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward {spec!r}: {path} has no function {name!r}: define (completion, answer) -> float")
    return function
