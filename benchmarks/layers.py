"""Time each layer of ``ivegan/layers.py`` beside torch's own, forward and backward, in turns.

    python benchmarks/layers.py --precision bfloat16 --rounds 15

The shapes are those of the presets. Ratios above 1 say that ours is faster. The last line is one
JSON object.
"""

import argparse
import copy
import json
import time

import torch
from common import device_name, spread
from torch import Tensor, nn

from ivegan import layers

CASES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "Conv2d, mnist's first": (layers.Conv2d(1, 64, 5, 2, 2), (128, 1, 32, 32)),
    "Conv2d, celeba's 5x5": (layers.Conv2d(64, 64, 5, 1, 2), (8, 64, 64, 64)),
    "ConvTranspose2d, mnist's third": (
        layers.ConvTranspose2d(128, 64, 5, 2, 2, 1),
        (128, 128, 16, 16),
    ),
    "ImageConv2d, grey": (layers.ImageConv2d(64, 1, 5, padding=2), (128, 64, 32, 32)),
    "ImageConv2d, colour": (layers.ImageConv2d(64, 3, 5, padding=2), (8, 64, 128, 128)),
}


def seconds(layer: nn.Module, x: Tensor, precision: torch.dtype) -> float:
    """Return how long a forward and a backward pass take together."""
    start = time.perf_counter()
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        y = layer(x)
    y.backward(torch.ones_like(y))
    return time.perf_counter() - start


def main() -> None:
    """Print a line per layer and one JSON object."""
    parser = argparse.ArgumentParser(description="Time layers beside torch's own")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    precision = getattr(torch, options.precision)
    report = {}
    for name, (ours, shape) in CASES.items():
        if precision != torch.float32 and len(shape) == 2:
            continue  # points are computed in float32
        own = layers.plain(copy.deepcopy(nn.Sequential(ours)))
        x = torch.randn(shape, requires_grad=True)
        if x.ndim == 4:
            x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
            ours, own = (m.to(memory_format=torch.channels_last) for m in (ours, own))  # pyright: ignore[reportCallIssue]
        ratios = []
        for number in range(options.rounds + 2):
            pair = (own, ours) if number % 2 else (ours, own)
            took = {id(layer): seconds(layer, x, precision) for layer in pair}
            ratios.append(took[id(own)] / took[id(ours)])
        del ratios[:2]  # warm-up
        report[name] = spread(ratios)
        print(f"{name:32} {report[name]['ratio']:5.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")
    facts = {
        "precision": options.precision,
        "device": device_name("cpu"),
        "torch": torch.__version__,
    }
    print(json.dumps({**facts, "own_to_ours": report}), flush=True)


if __name__ == "__main__":
    main()
