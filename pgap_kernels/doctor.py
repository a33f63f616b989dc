"""What runs here, which backend serves which op and why, and whether the noise is the contract's."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from typing import Any

import torch

from . import __version__, backends, cpu, noise
from .checks import WEIGHT_DTYPES
from .ops import draw

# Philox known answers (Random123) and a few draws of key derive(1, 2, dense), id of "weight": one normal of each
# lane and of the next group by its bits, and the first 32 signs, bit i for element i.
_PHILOX_COUNTER, _PHILOX_KEY = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
_PHILOX_ANSWERS = {
    7: (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    10: (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
}
_NORMALS = {0: 0x3EAF4791, 1024: 0xBF360FC6, 2048: 0x3F3FC6D4, 3072: 0x3F9666D2, 4096: 0xBFA3E0D8}
_SIGNS = 0xBB7BC6D7
_NO_TRITON = "triton: has the noise but no kernels for the ops yet"
_PACKAGES = ("torch", "triton", "numpy", "transformers", "peft", "accelerate", "gguf")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    devices = [f"cpu ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"]
    if torch.cuda.is_available():
        devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return devices


def _choices() -> list[dict[str, str]]:
    kinds = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    rows = []
    for op in backends.OPS:
        for kind in kinds:
            for dtype in WEIGHT_DTYPES:
                if op in ("assemble_gradient_", "aligned_core") and dtype != torch.float32:
                    continue
                device = torch.device(kind)
                refusals = [(b.name, b.refusal(op, device, dtype)) for b in backends.BACKENDS]
                why = [_NO_TRITON, *(f"{name}: {reason}" for name, reason in refusals if reason)]
                row = {"op": op, "device": kind, "dtype": str(dtype).removeprefix("torch.")}
                try:
                    row["backend"] = backends.select(op, device, dtype).name
                except ValueError as error:
                    row["backend"], why = "none", [str(error)]
                rows.append(row | {"reason": "; ".join(why)})
    return rows


def _self_test() -> dict[str, bool]:
    results = {
        f"philox4x32-{rounds}": noise.philox4x32(_PHILOX_COUNTER, _PHILOX_KEY, rounds) == answer
        for rounds, answer in _PHILOX_ANSWERS.items()
    }
    key, tid = noise.derive(1, 2, noise.Role.DENSE), noise.tensor_id("weight")
    for backend in backends.BACKENDS:
        if backend.refusal("assemble_gradient_", torch.device("cpu"), torch.float32):
            continue
        bits = draw(4097, key, tid, backend=backend.name).view(torch.int32).long() & 0xFFFFFFFF
        results[f"normal, {backend.name}"] = all(bits[i] == answer for i, answer in _NORMALS.items())
        signs = draw(32, key, tid, distribution="rademacher", backend=backend.name).tolist()
        results[f"rademacher, {backend.name}"] = sum((sign > 0) << i for i, sign in enumerate(signs)) == _SIGNS
    return results


def examine() -> dict[str, Any]:
    """Everything ``pgap-kernels doctor`` reports, as JSON-ready values."""
    isa = None
    if cpu.unavailable is None:
        used, best = cpu.isa()
        isa = {"used": used, "best": best}
    return {
        "pgap_kernels": __version__,
        "contract_version": noise.CONTRACT_VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: _version(package) for package in _PACKAGES},
        "devices": _devices(),
        "isa": isa,
        "extension": cpu.unavailable or "loaded",
        "choices": _choices(),
        "self_test": _self_test(),
    }


def main(json_output: bool = False) -> int:
    """Print the report; the exit status is 0 if every self-test passed, else 1."""
    report = examine()
    passed = all(report["self_test"].values())
    if json_output:
        json.dump(report, sys.stdout, indent=2)
        print()
        return 0 if passed else 1
    print(f"pgap_kernels {report['pgap_kernels']}, noise contract {report['contract_version']}")
    print(f"python {report['python']} on {report['platform']}")
    print(", ".join(f"{name} {version or 'not installed'}" for name, version in report["packages"].items()))
    print("devices: " + ", ".join(report["devices"]))
    isa = report["isa"]
    print(f"extension: {report['extension']}" + (f", ISA {isa['used']} (best here: {isa['best']})" if isa else ""))
    print(f"\n{'op':20}{'device':8}{'dtype':10}{'backend':11}why not another")
    for row in report["choices"]:
        print(f"{row['op']:20}{row['device']:8}{row['dtype']:10}{row['backend']:11}{row['reason']}")
    print()
    for name, ok in report["self_test"].items():
        print(f"{'ok  ' if ok else 'FAIL'} {name}")
    return 0 if passed else 1
