"""Time a command from its start to the end of its first train step.

    python benchmarks/startup.py --rounds 5

Times ``train.py`` on two Ray workers, its plain loop, and a process that only imports torch, in
turns. Digits are built and cached before, as on any second start. The last line is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from common import device_name, in_turns, spread

ROOT = Path(__file__).resolve().parents[1]


def seconds_to_first_step(command: list[str]) -> float:
    """Return the seconds from a command's start until it prints the line of its first step."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("images "):
                break
        else:
            raise SystemExit(f"{' '.join(command)} ended before its first step.")
        took = time.perf_counter() - start
        for _ in process.stdout:
            pass
    return took


def train(*words: str) -> list[str]:
    """Return the command of a run of two steps that prints a line for each."""
    sizes = ["--batch_size", "128", "--total-images", "256", "--log-every", "1"]
    name = ["--run-id", f"r{uuid.uuid4().hex[:8]}"]
    return [sys.executable, str(ROOT / "pipelines/train.py"), "digits", *sizes, *name, *words]


def main() -> None:
    """Print a line per round and one JSON object."""
    parser = argparse.ArgumentParser(description="Time the start of a run")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    cases = {
        "train.py, 2 workers": lambda: seconds_to_first_step(train()),
        "train.py --workers 0": lambda: seconds_to_first_step(train("--workers", "0")),
        "import torch": lambda: seconds_to_first_step(
            [sys.executable, "-c", "import torch; print('images ')"]
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        subprocess.run(train("--workers", "0"), check=True, stdout=subprocess.DEVNULL)
        values = in_turns(cases, options.rounds, "s")
        os.chdir("/")
    report = {name: spread(seconds) for name, seconds in values.items()}
    metadata = {"rounds": options.rounds, "device": device_name("cpu")}
    print(json.dumps({**metadata, "seconds": report}), flush=True)


if __name__ == "__main__":
    main()
