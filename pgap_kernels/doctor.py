"""What runs here, which backend serves which op and why, and whether the noise is the contract's."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import platform
import sys
import textwrap
import warnings
from typing import Any

import torch

from . import __version__, backends, cpu, extension, noise
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
_FLOAT32_ONLY = ("assemble_gradient_", "aligned_core")
_PACKAGES = ("torch", "triton", "numpy", "transformers", "peft", "accelerate", "gguf")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if importlib.util.find_spec(package) is None:
            return None
        # ROCm's Triton, say, is distributed under another name.
        return getattr(importlib.import_module(package), "__version__", "of unknown version")


def _devices() -> list[str]:
    devices = [f"cpu ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"]
    if torch.cuda.is_available():
        devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return devices


def _no_gpu() -> str | None:
    """What keeps CUDA tensors from existing here, or None."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return "no such device here: this PyTorch is built without CUDA and ROCm"
    return "no such device here: PyTorch finds no CUDA or ROCm device"


def _served_by(op: str, device: torch.device, dtype: torch.dtype) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the reference is slow, which the table shows anyway
            return backends.select(op, device, dtype).name
    except ValueError:
        return "none"


def _why(served: str, refusals: dict[str, str | None]) -> list[str]:
    """Why each of the other backends does not serve an op."""
    refused = [f"{name}: {reason}" for name, reason in refusals.items() if reason]
    forced = backends.forced()
    if forced is not None:
        source, name = forced
        return [f"{source}={name} is {'set' if name in refusals else 'unknown'}", *refused]
    spare = [name for name, reason in refusals.items() if not reason and name not in (served, "reference")]
    return refused + [f"{name}: serves too, if forced" for name in spare]


def _choices() -> list[dict[str, Any]]:
    """Which backend serves an op, and why no other does; GPUs are listed on machines without one, too."""
    rows = []
    for op, kind, dtype in itertools.product(backends.OPS, ("cpu", "cuda"), WEIGHT_DTYPES):
        if op in _FLOAT32_ONLY and dtype != torch.float32:
            continue
        device, missing = torch.device(kind), _no_gpu() if kind == "cuda" else None
        served = _served_by(op, device, dtype)
        why = _why(served, {b.name: b.refusal(op, device, dtype) for b in backends.BACKENDS})
        rows.append(
            {
                "op": op,
                "device": kind,
                "present": missing is None,
                "dtype": str(dtype).removeprefix("torch."),
                "backend": served,
                "reason": "; ".join([missing, *why] if missing else why),
            }
        )
    return rows


def _known_draws(backend: str, device: torch.device) -> tuple[bool, bool]:
    """Whether a backend draws the contract's normals, and its signs."""
    key, tid = noise.derive(1, 2, noise.Role.DENSE), noise.tensor_id("weight")
    with backends.use_backend(backend):
        bits = draw(4097, key, tid, device=device).cpu().view(torch.int32).long() & 0xFFFFFFFF
        signs = draw(32, key, tid, distribution="rademacher", device=device).tolist()
    return (
        all(bits[i] == answer for i, answer in _NORMALS.items()),
        sum((sign > 0) << i for i, sign in enumerate(signs)) == _SIGNS,
    )


def _self_test() -> dict[str, bool]:
    """Known answers of key derivation, and of every backend on every device on which it draws."""
    results = {
        f"philox4x32-{rounds}": noise.philox4x32(_PHILOX_COUNTER, _PHILOX_KEY, rounds) == answer
        for rounds, answer in _PHILOX_ANSWERS.items()
    }
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in gpus)]
    for backend, device in itertools.product(backends.BACKENDS, devices):
        if backend.refusal("assemble_gradient_", device, torch.float32):
            continue
        where = f"{backend.name} on {device}"
        try:
            results[f"normal, {where}"], results[f"rademacher, {where}"] = _known_draws(backend.name, device)
        except Exception as error:  # whatever a compiler or a driver raises is what this test reports
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            results[f"{where}: {said}"] = False
    return results


def examine() -> dict[str, Any]:
    """Everything ``pgap-kernels doctor`` reports, as JSON-ready values."""
    isa = None
    if extension.unavailable is None:
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
        "extension": extension.unavailable or "loaded",
        "choices": _choices(),
        "self_test": _self_test(),
    }


def _table(choices: list[dict[str, Any]]) -> list[str]:
    """The choices as text: ops and dtypes with the same answer share a row."""
    dtypes: dict[tuple, list[str]] = {}
    for row in choices:
        dtypes.setdefault((row["op"], row["device"], row["backend"], row["reason"]), []).append(row["dtype"])
    ops: dict[tuple, list[str]] = {}
    for (op, *answer), names in dtypes.items():
        ops.setdefault((*answer, ", ".join(names)), []).append(op)
    cells = [("op", "device", "dtype", "backend", "why not another")]
    for (device, name, why, kinds), served in sorted(ops.items(), key=lambda item: item[0][0]):
        cells.append((", ".join(served), device, kinds, name, why))
    widths = (25, 8, 11, 11, 62)
    lines = []
    for cell in cells:
        columns = [textwrap.wrap(text, width - 1) for text, width in zip(cell, widths, strict=True)]
        for parts in itertools.zip_longest(*columns, fillvalue=""):
            lines.append("".join(f"{part:{width}}" for part, width in zip(parts, widths, strict=True)).rstrip())
    return lines


def _nothing_served(choices: list[dict[str, Any]]) -> str | None:
    """Why no op can be called on any device here, or None if some can."""
    forced = backends.forced()
    if forced is None or any(row["present"] and row["backend"] != "none" for row in choices):
        return None
    source, name = forced
    if name not in backends.names():
        return f"{source}: got {name!r}, so that every op is an error; accepted: {', '.join(backends.names())}"
    return f"{source}: {name!r} serves no op on the devices here, and the table says why; unset it, or run elsewhere"


def main(json_output: bool = False) -> int:
    """Print the report; the exit status is 0 if every self-test passed and some op is served, else 1."""
    report = examine()
    problem = _nothing_served(report["choices"])
    passed = all(report["self_test"].values()) and problem is None
    if problem is not None:
        print(f"pgap-kernels: error: {problem}", file=sys.stderr)
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
    print()
    for line in _table(report["choices"]):
        print(line)
    print()
    for name, ok in report["self_test"].items():
        print(f"{'ok  ' if ok else 'FAIL'} {name}")
    return 0 if passed else 1
