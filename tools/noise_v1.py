"""The evidence behind docs/noise_v1.md: the error of the exact transform against float64.

    python -m tools.noise_v1 [--angles 1024]     every u with some angles, every angle with some u

The other evidence: tools.compiled counts slots of compiled code, benchmarks.kernels measures CPU time.
"""

from __future__ import annotations

import argparse
import json
import math

import torch

import pgap_kernels.cpu  # noqa: F401  registers the extension's operators


def transform(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The extension's Box-Muller of int32 word tensors."""
    even, odd = torch.empty(len(a)), torch.empty(len(a))
    torch.ops.pgap_kernels_cpu.box_muller(a, b, even, odd)
    return even, odd


def error(angles: int) -> list[dict]:
    """Largest |z - z64| and |z - z64| / max(|z64|, 1): every u with some angles, every angle with a few u."""
    k, angle = torch.arange(1 << 23), torch.arange(1 << 24)
    radius = (-2 * torch.log((2 * k + 1).double() * 2.0**-24)).sqrt()
    # A step of an odd number of grid points meets every residue; the last ones are the ends of the quarters.
    some = [i * ((1 << 24) // angles | 1) % (1 << 24) for i in range(angles)]
    some += [0, 1, (1 << 22) - 1, 1 << 22, (1 << 23) - 1, 1 << 23, (3 << 22) - 1, 3 << 22, (1 << 24) - 1]
    rows = [_worst("every u", ((_int32(k << 9), _int32(torch.full_like(k, t << 8)), radius, t) for t in some))]
    every = _int32(angle << 8)
    few = [0, 1, 5, 1 << 10, 1 << 16, 1 << 20, 3 << 20, 1 << 22, 5 << 20, 6 << 20, 7 << 20]
    few += [(1 << 23) - 2, (1 << 23) - 1]
    rows.append(_worst("every angle", ((_int32(torch.full_like(angle, u << 9)), every, radius[u], angle) for u in few)))
    return rows


def _int32(word: torch.Tensor) -> torch.Tensor:
    return (word - ((word >> 31) << 32)).to(torch.int32)


def _worst(name: str, sweeps) -> dict:
    row: dict = {"sweep": name, "count": 0, "absolute": 0.0, "relative": 0.0, "max_abs_z": 0.0}
    for a, b, radius, angle in sweeps:
        theta = torch.as_tensor(angle).double() * (2 * math.pi * 2.0**-24)
        for got, factor in zip(transform(a, b), (theta.cos(), theta.sin()), strict=True):
            exact = radius * factor
            off = (got.double() - exact).abs_()
            row["absolute"] = max(row["absolute"], off.max().item())
            row["relative"] = max(row["relative"], (off / exact.abs().clamp_(min=1.0)).max().item())
            row["max_abs_z"] = max(row["max_abs_z"], got.abs().max().item())
        row["count"] += len(a)
    return row


def main() -> None:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tools.noise_v1", description=__doc__, formatter_class=shape)
    parser.add_argument("--angles", type=int, default=1024, help="with which every u is tried; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    args = parser.parse_args()
    rows = error(args.angles)
    if args.json:
        print(json.dumps(rows))
        return
    for row in rows:
        print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


if __name__ == "__main__":
    main()
