"""What several test files use: small runs, fixed roll-outs, and comparisons."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.multiprocessing as mp
from PIL import Image
from torch.distributed.tensor import DTensor

import toy.model
import train
from data import Sample
from infra import checkpoint as checkpoint_file
from infra.config import TrainConfig
from infra.options import parse_options
from infra.parallel import World, end_process, free_port
from infra.run import Run
from infra.runlog import LOGS, read_rows
from model.vlm import Prompt, blank_prompt, trainable
from rollout import completion_logprobs
from train import Rollout

ALONE = World(0, 1, torch.device("cpu"), None)
CONFIG = TrainConfig(
    data="unused", prompts_per_step=4, group_size=3, beta=0.1, max_grad_norm=1e9, max_completion_tokens=9
)
GROUP = CONFIG.group_size


class Recorder:
    """Stands where an optimizer does and keeps the gradients it is asked to apply."""

    def __init__(self, model):
        self.model, self.gradients = model, {}

    def step(self):
        for name, parameter in trainable(self.model):
            gradient = parameter.grad
            self.gradients[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()

    def zero_grad(self, set_to_none):
        self.model.zero_grad(set_to_none=set_to_none)


def make_model(seed=3):
    processor = toy.model.build_processor()
    return toy.model.build_model(processor.tokenizer, seed=seed), processor


def make_rollout(model, processor, world):
    """This rank's share of four groups; the images are all in the first and third, so rank 1 of two has none."""
    inputs = make_prompts(processor, (1, 0, 2, 0))
    completions = make_completions(model, 4, GROUP)
    rewards = torch.rand(4 * GROUP, generator=torch.Generator().manual_seed(2))
    mine = slice(world.rank, None, world.size)
    prompts = [Prompt(i, "", Sample("s", "q", "a", (), "", False, "test"), None, None) for i in inputs]
    totals = rewards.view(4, GROUP)[mine].flatten()
    widest = max(len(ids) for group in completions[mine] for ids in group)
    return Rollout(
        prompts=prompts[mine],
        completions=completions[mine],
        draw_logprobs=torch.zeros(len(totals), widest),
        texts=[""] * len(totals),
        paid=[{"iou": value} for value in totals.tolist()],
        totals=totals,
        num_reward_errors=0,
    )


def make_run(model, processor, world, optimizers, *, reference=None, out=Path("nowhere"), **changes):
    """A run around a model and a rollout that are there already: no data, no files."""
    return Run(
        config=replace(CONFIG, **changes),
        world=world,
        out=out,
        policy=model,
        processor=processor,
        reference=reference,
        optimizers=optimizers,
        feed=None,
        eval_sets={},
        keeper=None,
        log=None,
        stop=None,
        num_steps=1,
        step=0,
        eos_ids=[],
        banned_ids=[],
        blank=blank_prompt(processor),
        figures={"skipped_updates": 0.0},
    )


def learn(run, rollout):
    """train.train_step on a rollout that is drawn and paid already; its figures."""
    with (
        patch.object(Run, "prompts", lambda run: rollout.prompts),
        patch.object(train, "draw", lambda run, prompts: (prompts, None, None)),
        patch.object(train, "pay", lambda run, prompts, completions, draw_logprobs: rollout),
    ):
        return train.train_step(run)[1]


def step_gradients(model, reference, processor, world, row_tokens, **changes):
    """Gradients and figures of one step, and the number of its rows."""
    recorder, rollout = Recorder(model), make_rollout(model, processor, world)
    run = make_run(model, processor, world, [recorder], reference=reference, row_tokens=row_tokens, **changes)
    figures = learn(run, rollout)
    return recorder.gradients, figures, len(run.pack(rollout.prompts, rollout.completions, range(len(rollout.prompts))))


def adamw_steps(model, processor, optimizer, world, count):
    """So many steps on the same rollout."""
    run = make_run(model, processor, world, [optimizer], beta=0.0)
    for _ in range(count):
        learn(run, make_rollout(model, processor, world))


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def spawn(job, count, *arguments):
    """Runs job(rank, port, *arguments) in that many processes."""
    mp.spawn(_run, (job, free_port(), *arguments), nprocs=count)


def _run(rank, job, port, *arguments):
    job(rank, port, *arguments)
    end_process()


def set_rank(rank, size, port, per_node=0):
    """Sets the variables by which torchrun would tell this process its place; `process_group` reads them."""
    per_node = per_node or size
    numbers = {"RANK": rank, "LOCAL_RANK": rank % per_node, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": per_node}
    numbers["MASTER_PORT"] = port
    os.environ.update({name: str(number) for name, number in numbers.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)


def relative_difference(a, b):
    largest = max(g.abs().max() for g in b.values())
    return max((a[name] - b[name]).abs().max() / largest for name in b).item()


def make_prompts(processor, image_counts=(1, 2, 0, 1)):
    """Prompts of different lengths with so many images each, of different sizes."""
    prompts, generator = [], torch.Generator().manual_seed(7)
    for number, count in enumerate(image_counts):
        sizes = [(64 + 32 * index, 48 + 16 * number) for index in range(count)]
        images = [
            Image.fromarray(torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())
            for width, height in sizes
        ]
        content = [{"type": "image"}] * count + [{"type": "text", "text": "the small red circle" + " above" * number}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        prompts.append(dict(processor(text=[text], images=images or None, return_tensors="pt")))
    return prompts


def make_completions(model, num_prompts, group_size=3):
    """Ragged random completions, free of vision tokens."""
    generator = torch.Generator().manual_seed(11)
    lengths = torch.randint(1, 9, (num_prompts, group_size), generator=generator).tolist()
    return [[torch.randint(10, 150, (length,), generator=generator) for length in group] for group in lengths]


def repeated_logprobs(model, prompts, completions):
    """The naive way: one plain forward of prompt + completion for every completion."""
    result = []
    for prompt, group in zip(prompts, completions, strict=True):
        rows = []
        for answer in group:
            ids = torch.cat([prompt["input_ids"][0], answer])[None]
            features = {key: prompt[key] for key in ("pixel_values", "image_grid_thw") if key in prompt}
            types = torch.cat([prompt["mm_token_type_ids"][0], torch.zeros_like(answer)])[None]
            logits = model(input_ids=ids, mm_token_type_ids=types, **features).logits[0]
            start = prompt["input_ids"].shape[1]
            rows.append(logits[start - 1 : -1].log_softmax(1).gather(1, answer[:, None])[:, 0])
        result.append(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
    return result


def compare_with_repeated_rows(model, prompts, completions, score=completion_logprobs):
    """Largest difference of log-probs, and of any parameter's gradient relative to the largest gradient."""
    generators = [torch.Generator().manual_seed(5) for _ in completions]
    weights = [
        torch.randn(len(group), max(map(len, group)), generator=generator)
        for group, generator in zip(completions, generators, strict=True)
    ]
    parameters, sides = [parameter for _, parameter in trainable(model)], []
    for function in (score, repeated_logprobs):
        logprobs = function(model, prompts, completions)
        loss = sum((values * weight).sum() for values, weight in zip(logprobs, weights, strict=True))
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        sides.append((torch.cat([values.detach().flatten() for values in logprobs]), gradients))
    (logprobs, gradients), (expected, expected_gradients) = sides
    largest = max(gradient.abs().max() for gradient in expected_gradients)
    differences = [(a - b).abs().max() / largest for a, b in zip(gradients, expected_gradients, strict=True)]
    return (logprobs - expected).abs().max().item(), max(differences).item()


def options(checkpoint, scenes, out, *more):
    """A command line for a small run."""
    return [
        "--model", checkpoint, "--data", str(scenes / "train.jsonl"), "--eval_data", str(scenes / "test.jsonl"),
        "--template", "plain", "--output_dir", str(out), "--prompts_per_step", "2", "--group_size", "3",
        "--max_completion_tokens", "6", "--min_pixels", "256", "--learning_rate", "1e-3",
        "--log_completions_every", "1",
        *more,
    ]  # fmt: skip


def run(checkpoint, scenes, out, *more):
    train.main(parse_options(TrainConfig, options(checkpoint, scenes, out, *more)))
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def only_numbers(rows):
    """Metrics without what differs from run to run: seconds, speed, memory."""
    return [
        {k: v for k, v in row.items() if not k.startswith(("seconds", "tokens_per_second", "memory"))} for row in rows
    ]


def outcome(out, step):
    """All that two equal runs have in common: figures, completions, evaluations, weights and training state."""
    directory = out / "checkpoints" / f"step-{step:06d}"
    rows = {name: read_rows(out / name) for name in LOGS}
    rows["metrics.jsonl"] = only_numbers(rows["metrics.jsonl"])
    files = {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "README.md"}
    return rows, files, (out / "best").resolve().name if (out / "best").exists() else None


def assert_equal(found, expected):
    for name, rows in expected[0].items():
        assert found[0][name] == rows, name
    assert found[1].keys() == expected[1].keys()
    for name, content in expected[1].items():
        assert found[1][name] == content, name
    assert found[2] == expected[2]


def argv_of(checkpoint, scenes, *more):
    """Options of a small run that evaluates and saves, without its directory."""
    argv = options(checkpoint, scenes, "", *more)
    place = argv.index("--output_dir")
    return argv[:place] + argv[place + 2 :]


def run_here(argv, out=None):
    """A run in this process."""
    return train.main(parse_options(TrainConfig, [*argv, *(["--output_dir", str(out)] if out else [])]))


def full_disk(monkeypatch, saves):
    """Makes these saves, counted from 1, run out of disk halfway."""
    count, real = [0], checkpoint_file.save_file

    def save(tensors, path):
        count[0] += 1
        if count[0] in saves:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(tensors, path)

    monkeypatch.setattr(checkpoint_file, "save_file", save)
