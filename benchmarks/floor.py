"""How near the step is to what the machine can do, and what the rest is lost to.

    python benchmarks/floor.py mnist --precision bfloat16
    python benchmarks/floor.py celeba --model.width 0.25 --batch-size 16 --precision bfloat16
    python benchmarks/floor.py celeba --device cuda --precision bfloat16

Counts the floating-point operations of every network by formula and by torch's counter, and those
of a whole step; counts the bytes that a step moves, as if every operation read its tensors from
memory and wrote them back; measures the machine's rates of matrix products and copies; and divides.
The limit is the slower of the two, operations at the matrix rate or bytes at the copy rate. An
operation's caches can make it move less, so the share by bytes is a bound that may be beaten.
The last line is one JSON object.
"""

import json
import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from common import arguments, configured, facts
from flop import of_networks, of_step, rates, wait
from step import our_steps, samples_of
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

GROUPS = {
    "convolutions, backward": ("convolution_backward", "ConvolutionBackward"),
    "convolutions, forward": ("convolution", "conv2d"),
    "norms": ("norm",),
    "activations": ("leaky_relu", "tanh", "sigmoid", "softplus"),
    "matrix products": ("::mm", "addmm", "matmul", "bmm"),
    "optimizers": ("Adam", "adam", "lerp"),
    "T": ("grid_sampler", "affine_grid"),
    "copies, sums and other elementwise": ("aten::",),
}


class Bytes(TorchDispatchMode):
    """Adds up the sizes of all tensors that operations take and give; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation."""
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            for value in tree_leaves((args, kwargs, out)):
                if isinstance(value, Tensor):
                    self.total += value.numel() * value.element_size()
        return out


def lost_to(steps: Any, device: str) -> dict[str, float]:
    """Return the share of time of each group of operations, over three steps."""
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    wait(device)
    start = time.perf_counter()
    with profile(activities=activities) as seen:
        for _ in range(3):
            next(steps)
        wait(device)
    took = (time.perf_counter() - start) * 1e6
    times: dict[str, float] = defaultdict(float)
    for event in seen.key_averages():
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        for group, words in GROUPS.items():
            if any(word in event.key for word in words):
                times[group] += own
                break
    total = took if device == "cuda" else max(took, sum(times.values()))
    shares = {group: t / total for group, t in sorted(times.items(), key=lambda i: -i[1])}
    return shares | {"Python, launches and waiting": max(0.0, 1 - sum(shares.values()))}


def main() -> None:
    """Print a report and one JSON object."""
    parser = arguments("How near the step is to the machine's limit")
    parser.add_argument("--steps", type=int, default=7)
    options = parser.parse_args()
    config = configured(options)
    samples = samples_of(config, 512)
    device, n = options.device, config.batch_size
    of = of_networks(config)
    steps = our_steps(config, samples, device, options.precision)
    for _ in range(3):
        next(steps)
    with FlopCounterMode(display=False) as counter:
        next(steps)
    with Bytes() as moved:
        next(steps)
    took = []
    for _ in range(options.steps):
        wait(device)
        start = time.perf_counter()
        next(steps)
        wait(device)
        took.append(time.perf_counter() - start)
    flop_rate, byte_rate = rates(device, getattr(torch, options.precision))
    seconds, flop = statistics.median(took), n * of_step(of)
    report = {
        **facts(options, config),
        "flop_per_image": of,
        "step_flop_per_image": flop / n,
        "step_flop_per_image_by_counter": counter.get_total_flops() / n,
        "step_bytes_per_image": moved.total / n,
        "matrix_flop_per_second": flop_rate,
        "copy_bytes_per_second": byte_rate,
        "seconds_per_step": seconds,
        "share_by_operations": flop / flop_rate / seconds,
        "share_by_bytes": moved.total / byte_rate / seconds,
        "share_of_limit": max(flop / flop_rate, moved.total / byte_rate) / seconds,
        "time_goes_to": lost_to(steps, device),
    }
    for name, flops in of.items():
        formula, counted = flops["formula"] / 1e6, flops["counter"] / 1e6
        print(f"{name:8} {formula:10.2f} MFLOP forward, {counted:.2f} counted")
    counted, megabytes = counter.get_total_flops() / n / 1e6, moved.total / n / 1e6
    step = f"{flop / n / 1e6:10.2f} MFLOP an image, {counted:.2f} counted"
    print(f"step     {step}; {megabytes:.2f} MB")
    print(f"machine  {flop_rate / 1e9:10.0f} GFLOP/s, {byte_rate / 1e9:.1f} GB/s")
    shares = f"{report['share_by_operations']:.0%} by operations, {report['share_by_bytes']:.0%}"
    print(f"reached  {n / seconds:10.1f} images/s: {shares} by bytes")
    for group, share in report["time_goes_to"].items():
        print(f"  {share:6.1%}  {group}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
