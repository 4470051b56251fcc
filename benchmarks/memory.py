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
from step import our_steps, processor, samples_of
from textbook import steps as textbook_steps

from ivegan.config import PRESETS, override, preset


def held(name: str) -> int:
    """Return a figure of this process's memory in bytes: VmRSS is now, VmHWM the most ever."""
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) * 1024 for row in rows if row.startswith(f"{name}:"))


def main() -> None:
    """Print two lines and one JSON object."""
    parser = argparse.ArgumentParser(description="Measure the train step's memory")
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--model.width", dest="width", type=float)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--accumulate", type=int, default=1, help="parts of a batch")
    parser.add_argument("--loop", choices=("ours", "textbook"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    changes = {"batch_size": options.batch_size, "model.width": options.width}
    config = override(preset(options.preset), {k: v for k, v in changes.items() if v is not None})
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
        "preset": options.preset,
        "width": config.model.width,
        "batch_size": config.batch_size,
        "precision": options.precision,
        "accumulate": options.accumulate,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else processor(),
        "torch": torch.__version__,
        "peak_gb": peaks,
        "ours_to_textbook": peaks["ours"] / peaks["textbook"],
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
