"""The peak memory of the train step beside that of the textbook loop, each in its own process.

    python benchmarks/memory.py celeba --precision bfloat16
    python benchmarks/memory.py celeba --device cuda --precision bfloat16 --accumulate 4

On a CPU it is what the process holds at its peak beyond what it held before the networks were made,
on a GPU what torch allocated. Three steps are enough: the second is the first with an optimizer's
moments. The last line is one JSON object.
"""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

import torch
from common import arguments, configured, facts
from step import our_steps, samples_of
from textbook import steps as textbook_steps


def held(name: str) -> int:
    """Return a figure of this process's memory in bytes: VmRSS is now, VmHWM the most ever."""
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) * 1024 for row in rows if row.startswith(f"{name}:"))


def main() -> None:
    """Print two lines and one JSON object."""
    parser = arguments("Measure the train step's memory")
    parser.add_argument("--accumulate", type=int, default=1, help="parts of a batch")
    parser.add_argument("--loop", choices=("ours", "textbook"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    config = configured(options)
    if options.loop:
        samples = samples_of(config, 2 * config.batch_size)
        before = held("VmRSS")
        if options.loop == "ours":
            steps = our_steps(
                config, samples, options.device, options.precision, parts=options.accumulate
            )
        else:
            steps = textbook_steps(config, samples, options.device, 0)
        for _ in itertools.islice(steps, 3):
            pass
        cuda = options.device == "cuda"
        print(torch.cuda.max_memory_allocated() if cuda else held("VmHWM") - before)
        return
    peaks = {}
    for loop in ("ours", "textbook"):
        command = [sys.executable, __file__, *sys.argv[1:], "--loop", loop]
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        peaks[loop] = int(told.stdout.split()[-1]) / 1e9
        print(f"{loop}: {peaks[loop]:.2f} GB", flush=True)
    report = {
        **facts(options, config),
        "accumulate": options.accumulate,
        "peak_gb": peaks,
        "ours_to_textbook": peaks["ours"] / peaks["textbook"],
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
