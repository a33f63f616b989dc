"""One data set as three tasks: which of eight topics a piece of newswire has.

    python examples/tasks.py                    about twenty minutes on two cores
    python examples/tasks.py --only choice

classification   the topic's word among those of all eight
choice           the topic's word among four, other ones in every row
generation       the word itself, by greedy decoding

Each writes a report to runs/tasks/TASK; look at report.html there.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from pgap_kernels.finetune import Config, records, run
from pgap_kernels.finetune.builtin import BUILT_IN


def directions(examples: int, count: int, lr: float) -> dict:
    """So many directions for each of some examples, all in one forward, each against the mean of the others."""
    options = {"members": count, "groups": examples, "directions": count, "baseline": "loo", "lr": lr}
    return {"batch_size": examples, "options": options}


# An example of a choice has a row for each option: all make forwards of 32 rows.
DIRECTIONS = {
    "classification": directions(4, 8, 2.4e-4),
    "choice": directions(2, 4, 1.2e-4),
    "generation": directions(4, 8, 2.4e-4),
}
TOPICS = dict(pair.split("=") for pair in BUILT_IN["r8"].settings["verbalizers"].split(","))


def write_rows(task: str, file: Path) -> None:
    """The newswire as a task's own file, as you would write yours."""
    draw = random.Random(0)
    lines = []
    for record in records.read("r8")[0]:
        right = TOPICS[record["label"]].strip()
        row = {"text": record["text"], "label": right}
        if task == "choice":
            others = draw.sample([word.strip() for word in TOPICS.values() if word.strip() != right], 3)
            row["choices"] = draw.sample([right, *others], 4)
        lines.append(json.dumps(row))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines))


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["classification", "choice", "generation"], metavar="TASK")
    parser.add_argument("--model", default="default")
    parser.add_argument("--method", default="pgap", help="any of pgap-kernels methods (default: pgap)")
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--sizes", type=int, nargs=3, default=[1000, 100, 200], metavar="N", help="train, dev and test")
    parser.add_argument("--output", default="runs/tasks", metavar="DIR")
    parser.add_argument("--files-only", action="store_true", help="write the tasks' data to DIR, and run nothing")
    args = parser.parse_args(given)
    for task in args.only:
        folder = Path(args.output, task)
        file = folder.with_suffix(".jsonl")
        write_rows(task, file)
        if args.files_only:
            continue
        report = run(
            Config(
                model=args.model,
                method=args.method,
                data=str(file),
                task=task,
                template="{text}\nTopic:",
                max_length=64,
                too_long="cut",
                max_new_tokens=3,
                train_size=args.sizes[0],
                dev_size=args.sizes[1],
                test_size=args.sizes[2],
                steps=args.steps,
                eval_every=30,
                **(DIRECTIONS[task] if args.method == "pgap" else {"batch_size": 4}),
                output=str(folder),
                overwrite=True,
            )
        )
        before, after = (report["test"][when] for when in ("before", "after"))
        print(f"{task}: {before} -> {after}")


if __name__ == "__main__":
    main()
