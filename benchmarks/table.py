"""Run the benchmarks one after the other and print one table of ratios: ``make bench``.

    python benchmarks/table.py --out runs/bench
    python benchmarks/table.py --only step,seeds

Every row is a ratio, or a share, from one alternating run, with its reference, its spread over the
rounds and what was aimed at; OUT/table.json holds what each benchmark said, OUT/table.md the table.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import device_name

HERE = Path(__file__).resolve().parent
Report = dict[str, Any]
Found = tuple[float, list[float]]


@dataclass(frozen=True)
class Row:
    """One ratio of a benchmark's report."""

    name: str
    reference: str
    of: Callable[[Report], Found]
    target: str


def to(group: str, reference: str) -> Callable[[Report], Found]:
    """Return what reads a ratio and its range from a part of a report."""
    return lambda report: (
        report[group][reference]["ratio"],
        report[group][reference]["range"],
    )


def alone(name: str) -> Callable[[Report], Found]:
    """Return what reads a ratio and its range from a report."""
    return lambda report: (report[name]["ratio"], report[name]["range"])


def one(of: Callable[[Report], float]) -> Callable[[Report], Found]:
    """Return what reads a single measurement, without a range."""
    return lambda report: (of(report), [of(report)] * 2)


def step(name: str, target: str) -> list[Row]:
    """Return the row of a step beside the textbook loop."""
    return [Row(name, "textbook loop", to("ours_to", "textbook"), target)]


def reading(name: str) -> list[Row]:
    """Return the rows of a loader beside the step."""
    return [
        Row(f"loader, {name}", "the step's rate", alone("loader_to_step"), ">= 5"),
        Row(f"wait for input, {name}", "time of a step", alone("waiting"), "<= .02"),
    ]


BF16 = ["--precision", "bfloat16"]
QUARTER = ["--model.width", "0.25"]
CASES: list[tuple[list[str], list[Row]]] = [
    (["step.py", "mnist", *BF16, "--rounds", "5"], step("step, mnist, bfloat16", ">= 3")),
    (["step.py", "mnist", "--rounds", "3"], step("step, mnist, float32", "")),
    (
        ["step.py", "celeba", *QUARTER, *BF16, "--rounds", "5"],
        step("step, celeba at .25, bfloat16", ">= 2.5"),
    ),
    (["step.py", "digits", "--rounds", "5"], step("step, digits, float32", "")),
    (["step.py", "ring", "--rounds", "9", "--seconds", "5"], step("step, ring", ">= 1.5")),
    (
        ["step.py", "ring", "--batch-size", "100", "--seeds", "10", "--rounds", "7"],
        [
            Row(
                "ten seeds of ring at once",
                "one after the other",
                to("ours_to", "one seed after the other"),
                ">= 2",
            )
        ],
    ),
    (["loader.py", "mnist", *BF16], reading("mnist")),
    (["loader.py", "celeba", *QUARTER, *BF16], reading("celeba at .25")),
    (
        ["ddp.py", "digits", "--rounds", "7"],
        [
            Row(
                "Ray Train, 2 workers",
                "torchrun, 2 processes",
                to("two_workers_to", "torchrun, 2 processes"),
                ">= .95",
            ),
            Row(
                "2 workers of 1 thread",
                "1 worker of 2 threads",
                to("two_workers_to", "Ray, 1 worker of 2 threads"),
                ">= .9",
            ),
        ],
    ),
    (
        ["memory.py", "celeba", *BF16],
        [
            Row(
                "memory in GB, celeba, batch 64",
                "a 12 GB device",
                one(lambda r: r["peak_gb"]["ours"]),
                "<= 12",
            ),
            Row(
                "memory, celeba, batch 64",
                "textbook loop",
                one(lambda r: r["ours_to_textbook"]),
                "",
            ),
        ],
    ),
    (
        ["startup.py"],
        [
            Row(
                "seconds to the first step, 2 workers",
                "",
                to("seconds", "train.py, 2 workers"),
                "",
            ),
            Row(
                "seconds to the first step, plain loop",
                "",
                to("seconds", "train.py --workers 0"),
                "",
            ),
        ],
    ),
]


def main() -> None:
    """Run all, or those that are asked for, and write the table."""
    parser = argparse.ArgumentParser(description="Run the benchmarks")
    parser.add_argument("--out", default="runs/bench")
    parser.add_argument("--only", help="scripts by name, with commas: step,loader,ddp")
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else [c[0][0][:-3] for c in CASES]
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}, {device_name('cpu')}, Python {platform.python_version()}, "
        f"torch {version('torch')}",
        "",
        "| what | beside | ratio | least to largest | aim |",
        "| --- | --- | --- | --- | --- |",
    ]
    print("\n".join(lines), flush=True)
    reports: list[Report] = []
    for words, rows in CASES:
        if words[0][:-3] not in chosen:
            continue
        command = [sys.executable, str(HERE / words[0]), *words[1:]]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        report = json.loads(done.stdout.splitlines()[-1])
        reports.append({"command": " ".join(words), **report})
        for row in rows:
            ratio, (least, most) = row.of(report)
            spread = "" if least == most else f"{least:.3g} to {most:.3g}"
            lines.append(
                f"| {row.name} | {row.reference} | {ratio:.3g} | {spread} | {row.target} |"
            )
            print(lines[-1], flush=True)
        (out / "table.json").write_text(json.dumps(reports, indent=2) + "\n")
        (out / "table.md").write_text("\n".join(lines) + "\n")
    print(f"\n{out / 'table.md'}, {out / 'table.json'}")


if __name__ == "__main__":
    main()
