"""``python worker.py PACKAGE MODULE``: ``MODULE.answer`` with the package of a checkout, a line of JSON per request.

Both trees have both folders: ``pgap_kernels`` must come from the checkout, and ``benchmarks`` from this tree.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path


def main(package: str, module: str) -> None:
    here = Path(__file__).resolve()
    sys.path[:] = [package, *(path for path in sys.path if Path(path).resolve() != here.parent)]
    import pgap_kernels

    if Path(package) not in Path(str(pgap_kernels.__file__)).resolve().parents:
        raise SystemExit(f"imported {pgap_kernels.__file__}, which is not of {package}")
    sys.path[0] = str(here.parents[2])
    answer = importlib.import_module(module).answer
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        request = json.loads(line)
        try:
            rows = answer(request)
        except Exception as error:  # an older package may lack an op or an option; the other cases go on
            rows = [{"case": request["case"], "unmeasured": f"{type(error).__name__}: {error}".splitlines()[0]}]
        print(json.dumps(rows), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
