"""The findings as data: arms, what they are measured by, what the paper claims, and its own numbers.

Options are written as on the command line. `Scope` fills in what stands in <...>, `Job` what stands in {...}.
"""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Scope:
    """How much is run; fixed before the runs that count."""

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 40  # of RL
    half: int = 20
    curve_steps: int = 60  # of RL where a curve is drawn, and between its points
    curve_points: int = 15
    sft_steps: int = 280  # take as long as curve_steps of RL, see docs/findings.md
    sft_points: int = 70
    limit: int = 0  # samples of each evaluation; 0 means all
    detection_steps: int = 100

    def fill(self, text: str) -> str:
        """The text with these numbers in their places."""
        for field in fields(self):
            text = text.replace(f"<{field.name}>", str(getattr(self, field.name)))
        return text


FULL = Scope()
QUICK = Scope(
    seeds=(0, 1), steps=2, half=1, curve_steps=2, curve_points=1, sft_steps=4, sft_points=2, detection_steps=2, limit=8
)  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One way to train, beside others; `options` come after those of its finding."""

    name: str
    options: str = ""
    command: str = "train"  # or "sft", or "" for the start itself
    size: str = ""  # of the start, where it is not the toy's own: a name of toy.STARTS
    at_once: bool = False  # asks for an answer without a thought


@dataclass(frozen=True)
class Finding:
    """One of the paper's findings."""

    title: str
    arms: tuple[Arm, ...]
    columns: tuple[str, ...]  # of the table
    compared: tuple[str, ...]  # the columns that the sentences compare
    base: str  # the arm that they compare with
    claims: tuple[tuple[str, str, str, str], ...]  # (arm, higher or lower, other arm, column)
    paper: str
    full_size: str
    options: str = ""  # of all arms
    detection: bool = False
    curves: tuple[str, ...] = ()  # evaluation sets whose accuracy is drawn over the steps, in place of the columns


PLAIN = "--save_every 0 --report False --eval_limit <limit> --steps <steps> --eval_every <steps>"
CURVE = "--save_every 0 --report False --eval_limit <limit> --steps <curve_steps> --eval_every <curve_points>"
SFT_CURVE = "--steps <sft_steps> --eval_every <sft_points>"
HACKED = ("od_ap", "od_ap50", "od_length", "od_f1", "weighted_sum")
SETS = ("test", "pairs", "relations")
GROUNDING = (*SETS, "IoU")
START = Arm("start", command="")
REAL = "python train.py --model Qwen/Qwen2.5-VL-3B-Instruct"
REFCOCO = (
    f"{REAL} --data rec_jsons_processed/refcoco_train.jsonl --image_root coco \\\n"
    "    --eval_data rec_jsons_processed/refcoco_val.json --steps 600 --gradient_checkpointing"
)
DETECTION = f"{REAL} --data ovd.jsonl --image_root coco --template detection --beta 0 \\\n    --gradient_checkpointing"

GENERALISE = Finding(
    title="RL and SFT on the same samples for the same time, in and out of domain",
    options=CURVE,
    arms=(
        START,
        Arm("RL"),
        Arm("SFT on true answers", SFT_CURVE, command="sft"),
        Arm("SFT on loose answers", f"{SFT_CURVE} --data {{data}}/train-loose.jsonl", command="sft"),
    ),
    columns=(*GROUNDING, "seconds"),
    curves=SETS,
    compared=SETS,
    base="RL",
    claims=(
        ("RL", "higher", "start", "pairs"),
        ("RL", "higher", "start", "relations"),
        ("RL", "higher", "SFT on true answers", "pairs"),
        ("RL", "higher", "SFT on true answers", "relations"),
    ),
    paper="""Table 2, Qwen2.5-VL-3B, steps 0 -> 600, accuracy at IoU 0.5 in percent, one run:

| | in domain: RefCOCO val | RefCOCO+ val | RefCOCOg val | out of domain: LISA-Grounding |
|---|---|---|---|---|
| SFT | 88.7 -> 88.7 | 81.95 -> 82.25 | 86.05 -> 85.95 | 56.51 -> 54.82 |
| RL | 88.7 -> 90.55 | 81.95 -> 84.3 | 86.05 -> 87.1 | 56.51 -> 63.14 |""",
    full_size=f"{REFCOCO}\n{REFCOCO.replace('train.py', 'sft.py')}\n"
    "python eval.py --model OUT/best --data lisa_test.json --image_root lisa",
)

HACKING = Finding(
    title="Five rewards for lists of boxes",
    arms=(START, *(Arm(name, f"--rewards {name} format") for name in HACKED)),
    columns=("boxes / true", "wrong labels", "precision", "recall", "mAP", "length", "unread"),
    compared=("boxes / true", "wrong labels", "precision", "mAP"),
    base="od_length",
    claims=(
        ("od_ap", "higher", "od_length", "boxes / true"),
        ("od_ap50", "higher", "od_length", "boxes / true"),
        ("od_ap", "higher", "od_length", "wrong labels"),
        ("od_ap50", "higher", "od_length", "wrong labels"),
        ("od_length", "higher", "od_ap", "mAP"),
        ("od_length", "higher", "od_ap50", "mAP"),
        ("od_length", "higher", "start", "mAP"),
    ),
    paper="""Table 5, Qwen2.5-VL-3B on D3, tested on COCO, one run each; the base model has 14.2, 56.06 and 33.79:

| reward | mAP | precision | recall |
|---|---|---|---|
| AP50 (`od_ap50`) | 11.4 | 45.33 | 31.85 |
| mAP (`od_ap`) | 11.8 | 46.02 | 33.34 |
| mAP x length (`od_length`) | 21.1 | 67.34 | 43.84 |

Figure 6: without a KL penalty the completions get ever longer under AP50 and stay short under `od_length`. Figure 7: an
answer that lists classes which are not there earns 0.99 by mAP and 0.12 by `od_length`.""",
    full_size="\n".join(f"{DETECTION} --rewards {name} format" for name in HACKED),
    detection=True,
)

AHA = Finding(
    title="Answers after a thought, and answers at once",
    arms=(
        Arm("start, thinking", command=""),
        Arm("start, at once", command="", at_once=True),
        Arm("thinking", "--rewards od_length format"),
        Arm("at once", "--rewards od_length format", at_once=True),
    ),
    columns=("right thoughts", "precision, absent", "only present", "precision", "recall", "mAP", "length"),
    compared=("precision, absent", "only present", "mAP"),
    base="thinking",
    claims=(
        ("thinking", "higher", "start, thinking", "right thoughts"),
        ("thinking", "higher", "start, thinking", "precision, absent"),
        ("thinking", "higher", "at once", "precision, absent"),
    ),
    paper="""Shown by examples only (Figure 7), without figures: with `od_length` the thought first names the listed
objects that are there, and the answer boxes only those.""",
    full_size=f"{DETECTION} --rewards od_length format",
    detection=True,
)

DATA = Finding(
    title="Complete annotation with absent classes, and easy annotation of one class",
    arms=(
        START,
        Arm("complete", "--rewards od_length format"),
        Arm("easy", "--rewards od_length format --data <easy>"),
    ),
    columns=("mAP", "precision", "recall", "precision, absent", "wrong labels", "boxes / true"),
    compared=("mAP", "precision", "recall", "precision, absent"),
    base="complete",
    claims=(
        ("complete", "higher", "easy", "mAP"),
        ("complete", "higher", "easy", "precision"),
        ("complete", "higher", "start", "mAP"),
    ),
    paper="""Table 6, Qwen2.5-VL-3B, `od_length`, one run each:

| trained on | mAP on COCO | OVDEval |
|---|---|---|
| nothing (base) | 14.2 | 25.46 |
| COCO | 12.6 | 24.48 |
| D3, complete and with absent classes | 21.1 | 31.01 |""",
    full_size=f"{DETECTION} --rewards od_length format\n"
    f"{DETECTION.replace('ovd.jsonl', 'coco_single_class.jsonl')} --rewards od_length format",
    detection=True,
)

SCALE = Finding(
    title="What RL adds at three sizes",
    options=PLAIN,
    arms=(Arm("0.3M", size="0.3M"), Arm("1.1M"), Arm("4.3M", size="4.3M")),
    columns=("test start", "test", "test gain", "pairs gain", "relations gain", "IoU", "seconds"),
    compared=("test", "test gain", "pairs gain"),
    base="1.1M",
    claims=(
        ("0.3M", "higher", "", "test gain"),
        ("1.1M", "higher", "", "test gain"),
        ("4.3M", "higher", "", "test gain"),
        ("4.3M", "higher", "0.3M", "test"),
    ),
    paper="""Table 7, Qwen2.5-VL, base -> RL, one run each:

| size | mAP on COCO | precision | recall | OVDEval |
|---|---|---|---|---|
| 3B | 14.2 -> 21.1 | 56.06 -> 67.34 | 33.79 -> 43.84 | 25.46 -> 31.01 |
| 7B | 14.4 -> 21.9 | 54.73 -> 74.46 | 33.36 -> 41.2 | 29.08 -> 32.42 |
| 32B | 18.6 -> 23.0 | 57.26 -> 74.04 | 47.58 -> 48.67 | 32.79 -> 36.79 |""",
    full_size="\n".join(f"{DETECTION.replace('3B', size)} --rewards od_length format" for size in ("3B", "7B", "32B")),
)

VARIANT = Finding(
    title="The options of the algorithm on the same budget of steps",
    options=PLAIN,
    arms=(
        START,
        Arm("grpo"),
        Arm("dapo", "--variant dapo"),
        Arm("dr_grpo", "--variant dr_grpo"),
        Arm("gspo", "--variant gspo"),
        Arm("gdpo", "--advantages gdpo"),
        Arm("refill rewards", "--refill rewards"),
        Arm("refill accuracy", "--refill accuracy"),
        Arm("two passes", "--num_iterations 2"),
        Arm("cispo, two passes", "--variant cispo --clip_high 4 --num_iterations 2"),
        Arm("sapo, two passes", "--variant sapo --num_iterations 2"),
        Arm("mask_truncated", "--mask_truncated True"),
        Arm("beta 0.04", "--beta 0.04"),
        Arm("beta 0.04, ref_every", "--beta 0.04 --ref_every <half>"),
        Arm("LoRA 64", "--lora_rank 64"),
        Arm("LoRA 64, rate 3e-3", "--lora_rank 64 --learning_rate 3e-3"),
    ),
    columns=(*GROUNDING, "tokens", "entropy", "equal groups", "cut off", "seconds"),
    compared=("test", "pairs", "IoU"),
    base="grpo",
    claims=(),
    paper="The paper trains with the default alone and compares no variants.",
    full_size=f"{REFCOCO} --variant dapo",
)

BETA = Finding(
    title="What the weight of the KL penalty does",
    options=PLAIN,
    arms=(
        START,
        # So small a weight changes nothing, but the run then measures the divergence.
        Arm("beta 0", "--beta 1e-9"),
        Arm("beta 0.01", "--beta 0.01"),
        Arm("beta 0.04", "--beta 0.04"),
        Arm("beta 0.1", "--beta 0.1"),
    ),
    columns=(*GROUNDING, "KL", "entropy", "seconds"),
    compared=(*SETS, "KL"),
    base="beta 0",
    claims=(
        ("beta 0.04", "lower", "beta 0", "KL"),
        ("beta 0.1", "lower", "beta 0", "KL"),
    ),
    paper="""No table: beta is 0.04 for single boxes and 0 for detection. Figure 6 and the blog say that completions get
longer and boxes redundant without the penalty.""",
    full_size="\n".join(f"{REFCOCO} --beta {beta}" for beta in ("0", "0.01", "0.04", "0.1")),
)

FINDINGS = {
    "generalise": GENERALISE,
    "hacking": HACKING,
    "aha": AHA,
    "data": DATA,
    "scale": SCALE,
    "variant": VARIANT,
    "beta": BETA,
}
