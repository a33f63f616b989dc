"""The rows of ``benchmarks.exactness`` as tables to read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.harness.tables import Table


def tables(section: str, rows: Sequence[dict]) -> Iterator[Table]:
    """The tables of a section."""
    if section == "drift":
        yield _drift(rows)
    elif section == "movement":
        for dtype in _distinct(rows, "dtype"):
            of_dtype = [r for r in rows if r["dtype"] == dtype]
            yield _random([r for r in of_dtype if r["table"] == "random"], dtype)
            yield _persistent([r for r in of_dtype if r["table"] == "persistent"], dtype)
    else:
        yield _cost(rows)
        yield _losses(rows)


def _distinct(rows: Sequence[dict], name: str) -> list:
    return list(dict.fromkeys(r[name] for r in rows))


def _drift(rows: Sequence[dict]) -> Table:
    last = max(r["step"] for r in rows)
    columns = ["scheme", "dtype", "changed, step 1", f"changed, step {last}", "RMS, step 1", f"RMS, step {last}"]
    lines = []
    for dtype in _distinct(rows, "dtype"):
        for scheme in _distinct(rows, "scheme"):
            own = {r["step"]: r for r in rows if (r["scheme"], r["dtype"]) == (scheme, dtype)}
            first, end = own[1], own[last]
            changes = [_changed(first), _changed(end), _size(first["drift"]), _size(end["drift"])]
            lines.append([scheme, dtype, *changes])
    elements = rows[0]["elements"]
    title = f"drift of {elements:,} weights with lr = 0 (RMS drift relative to the RMS of the weights)"
    return Table(columns, lines, title)


def _changed(row: dict) -> str:
    return f"{row['share']:.1%}" if row["changed"] else "0 bits"


def _size(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _random(rows: Sequence[dict], dtype: str) -> Table:
    sizes = _distinct(rows, "fresh")
    of_error = [s for s in sizes if s == 1e-5]
    columns = ["scheme", *(f"{s:.0e} RMS/step" for s in sizes), *(f"RMS error, {s:.0e}" for s in of_error)]
    lines = []
    for scheme in _distinct(rows, "scheme"):
        own = {r["fresh"]: r for r in rows if r["scheme"] == scheme}
        errors = [f"{own[s]['rms_error']:.1e}" for s in of_error]
        lines.append([scheme, *(_correlation(own[s]["correlation"]) for s in sizes), *errors])
    steps = rows[0]["steps"]
    title = f"{dtype}: correlation of actual and intended movement after {steps} steps, each in a new direction"
    at = {r["fresh"]: r["intended_rms"] for r in rows}
    return Table(columns, lines, title, "intended movement: " + ", ".join(f"{at[s]:.1e} at {s:.0e}" for s in sizes))


def _correlation(value: float) -> str:
    return f"{value:.4f}" if value > 0.99 else f"{value:.2f}"


def _persistent(rows: Sequence[dict], dtype: str) -> Table:
    pairs = list(dict.fromkeys((r["persistent"], r["fresh"]) for r in rows))
    lines = []
    for scheme in _distinct(rows, "scheme"):
        own = {(r["persistent"], r["fresh"]): r for r in rows if r["scheme"] == scheme}
        cells = (f"{_correlation(own[p]['correlation'])} / {own[p]['progress']:.2f}" for p in pairs)
        lines.append([scheme, *cells])
    steps = rows[0]["steps"]
    title = f"{dtype}: correlation / progress along a direction that stays, within noise, after {steps} steps"
    caption = f"with a window, folded merges every {rows[0]['window']} steps"
    return Table(["scheme", *(f"signal {s:.0e}, noise {n:.0e}" for s, n in pairs)], lines, title, caption)


def _cost(rows: Sequence[dict]) -> Table:
    columns = ["method", "mode", "outside forwards", "forwards", "step", "refresh", "passes/step"]
    columns += ["faster outside", "in all"]
    lines = []
    for r in rows:
        seconds = (f"{r['seconds'][part]:.3f}" for part in ("perturb", "forward", "total", "refresh"))
        gains = (f"{r[name]:.2f}x" for name in ("perturb_speedup", "step_speedup"))
        lines.append([_name(r), r["mode"], *seconds, f"{r['passes_per_step']:.3f}", *gains])
    title = "SmolLM2-135M, float32: seconds of a step (medians), of a refresh, and passes over the weights"
    return Table(columns, lines, title, "against in place; passes of P-GAP over a whole window, its refresh included")


def _losses(rows: Sequence[dict]) -> Table:
    columns = ["method", "mode", "probes of the refresh", "steps", "steps, against scratch"]
    columns += ["basis: least |cosine|", "of the other sign"]
    lines = []
    for r in rows:
        basis = ["-", "-"]
        if "basis_vectors" in r:
            basis = [f"{r['basis_min_cosine']:.6f}", f"{r['basis_flipped']} of {r['basis_vectors']}"]
        names = ("max_probe_loss_difference", "max_loss_difference", "max_loss_difference_to_scratch")
        lines.append([_name(r), r["mode"], *(_size(r[name]) for name in names), *basis])
    steps = len(rows[0]["losses"])
    return Table(columns, lines, f"losses against those in place, largest difference over {steps} steps")


def _name(row: dict) -> str:
    return f"P-GAP, rank {row['rank']}" if row["method"] == "pgap" else "MeZO"
