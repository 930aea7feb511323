"""`python -m tools.findings NAME`: trains the arms of a finding on the toy, then prints its table and draws its figure.

NAME.md and NAME.svg in the output directory hold what is printed; runs that an earlier call has done are reused.
"""

import argparse
import fcntl
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from infra.report_page import Line
from tools.findings.experiments import FINDINGS, FULL, QUICK, Finding, Scope
from tools.findings.figure import bar, curves, dots
from tools.findings.measures import curve, detection, grounding
from tools.findings.plan import plan, prepare
from tools.findings.runner import DONE, Job, run_jobs
from tools.findings.tables import Figures, compare_all, judge, markdown_table

MAX_PANELS = 5


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of the command; ends the process if a name is unknown."""
    parser = argparse.ArgumentParser(prog="python -m tools.findings", description=__doc__, allow_abbrev=False)
    parser.add_argument("name", choices=FINDINGS, metavar="NAME", help=", ".join(FINDINGS))
    parser.add_argument(
        "--quick", action="store_true", help="a few steps and samples: tries the command, shows nothing"
    )
    parser.add_argument("--jobs", type=int, metavar="N", default=2, help="runs at the same time, each on one core")
    parser.add_argument(
        "--output_dir", type=Path, metavar="D", default=Path("runs/findings"), help="where runs and tables go"
    )
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}: it must be at least 1")
    return options


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    options = parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends what runs, as Ctrl-C does
    scope = QUICK if options.quick else FULL
    home = options.output_dir.resolve() / ("quick" if options.quick else "")
    try:
        with alone(home):
            text = run_finding(options.name, scope, home, options.jobs)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the runs that are left", file=sys.stderr)
        return 130
    print(text)
    return 0


def run_finding(name: str, scope: Scope, home: Path, num_parallel: int) -> str:
    """Runs what is not done, writes NAME.svg and NAME.md, and returns the text of the latter."""
    finding = FINDINGS[name]
    prepare(finding, home)
    jobs = plan(finding, scope)
    run_jobs((job for seeds in jobs.values() for job in seeds), home, num_parallel, _say)
    figures = measure(finding, jobs, home)
    if finding.curves:
        drawing = draw_curves(finding, jobs, home)
    else:
        drawing = dots(finding.title, figures, finding.columns[:MAX_PANELS])
    picture = home / f"{name}.svg"
    picture.write_text(drawing, encoding="utf-8")
    text = describe(name, finding, figures, scope, minutes_of(jobs, home))
    (home / f"{name}.md").write_text(text, encoding="utf-8")
    return f"{text}\nfigure: {picture}"


@contextmanager
def alone(home: Path) -> Iterator[None]:
    """Keeps other calls out of this directory inside the block: they would begin the same runs again."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{home}: another call works here; wait for it, or give another --output_dir") from None
        yield


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(finding: Finding, jobs: dict[str, list[Job]], home: Path) -> Figures:
    """The figures of each arm, a value per seed; a figure counts where all seeds have it."""
    read, figures = detection if finding.detection else grounding, {}
    for arm, seeds in jobs.items():
        rows = [read(home / job.name) for job in seeds]
        figures[arm] = {key: [row[key] for row in rows] for key in rows[0] if all(key in row for row in rows)}
    return figures


def minutes_of(jobs: dict[str, list[Job]], home: Path) -> float:
    """How long all runs took, one after the other."""
    runs = {job for seeds in jobs.values() for job in seeds}
    marks = [json.loads((home / job.name / DONE).read_text(encoding="utf-8")) for job in runs]
    return sum(mark["seconds"] for mark in marks) / 60


def draw_curves(finding: Finding, jobs: dict[str, list[Job]], home: Path) -> str:
    """The accuracy of each trained arm over its share of the time."""
    panels = {}
    for name in finding.curves:
        panels[name] = []
        for arm in finding.arms:
            if arm.command:
                seeds = np.array([curve(home / job.name, name) for job in jobs[arm.name]])  # [seeds, points, 2]
                steps, bars = seeds[0, :, 0], np.array([bar(points.tolist()) for points in seeds[:, :, 1].T])
                line = Line(arm.name, 100 * steps / steps[-1], bars[:, 1], bars[:, [0, 2]])
                panels[name].append(line)
    return curves(finding.title, "share of the training time, percent", panels)


def describe(name: str, finding: Finding, figures: Figures, scope: Scope, minutes: float) -> str:
    """The table, what it says, the paper's own numbers, and the commands of the toy and of the real size."""
    quick = " --quick" if scope == QUICK else ""
    parts = [
        f"`python -m tools.findings {name}{quick}`: seeds {', '.join(map(str, scope.seeds))}; {minutes:.0f} minutes of "
        "runs, one after the other. Means and 95% intervals over the seeds (Student's t).",
        markdown_table(figures, finding.columns),
        judge(figures, finding.claims) if finding.claims else "",
        "\n".join(f"- {compare_all(figures, column, finding.base)}" for column in finding.compared),
        f"The paper: {finding.paper}",
        f"At the paper's size:\n\n```bash\n{finding.full_size}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
