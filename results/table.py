"""Print the scores in FOLDER/results.jsonl as a Markdown table, beside the papers' numbers.

    python results/table.py out

Of rows with the same settings the last one counts. The papers' numbers (targets.csv) are those of
the full method, beside ablations, too.
"""

import csv
import json
import pathlib
import re
import sys

TARGETS = (pathlib.Path(__file__).parent / "targets.csv").read_text()
# Names of the translator's modes in targets.csv
SUFFIXES = {"adapted": "", "one-net": "-1net", "scratch": "-wo-pretrain", "autoencoder": "-ae"}
SUFFIXES |= {"no-adaptation": "-wo-ada", "bilevel": "-bilevel", "baseline": "-baseline"}
HEAD = "method data per_class network iterations epochs runs seed accuracy random paper command"


def paper_number(row):
    """Find the paper's accuracies for a row: HaBa's by bases, the translator's by mode."""
    settings = row.get("settings", {})
    method = row["method"].replace("k-center", "kcenter").removesuffix("_fewshot")
    method += SUFFIXES[settings.get("mode", "adapted")] + "-ds" * settings.get("down_sample", False)
    # targets.csv has no other objective than mtt
    method += settings.get("objective", "mtt").removeprefix("mtt")
    # the translator's network is FRePo's, also where targets.csv has no prefix
    prefix = "frepo-" * method.startswith("translator")
    gray = settings.get("basis_channels") == 1 and "mnist" not in row["dataset"]
    budget = f"{row['per_class']}{' one-channel bases' * gray}"
    ours = (method, row["dataset"], budget, row["network"])
    found = []
    for target in csv.DictReader(TARGETS.splitlines()):
        bases = re.findall(r"\d+ one-channel bases|(?<=BPC )\d+", target["source"])
        *_, budget = [target["images_per_class"], *bases]
        network = prefix + target["network"].removeprefix(prefix)
        if ours == (target["method"], target["dataset"], budget, network):
            found.append(f"{target['mean']} +- {target['std']} ({target['source']})")
    return "; ".join(found)


def read_scores(path):
    """Read a results.jsonl -> {key of a job: cells of its line}."""
    lines = {}
    for row in map(json.loads, path.read_text().splitlines()):
        # corruption, continual: no single accuracy
        if "kind" in row:
            continue
        settings = row["settings"]
        kinds = [settings.get(name) for name in ("mode", "objective", "scoring")]
        names = ("dataset", "per_class", "network", "iterations", "epochs", "runs", "seed")
        cells = [" ".join([row["method"], *filter(None, kinds)]), *map(row.get, names)]
        # of tensors, core-sets and joined sets, settings do not tell which
        origin = row["command"] * (row["iterations"] == 0 or "+" in row["method"])
        key = (*cells, json.dumps(settings, sort_keys=True), str(row.get("data")), origin)
        ours = f"{row['accuracy']} +- {row['std']}"
        real = f"{row['random']} +- {row['random_std']} ({row['random_per_class']})"
        lines[key] = [*cells, ours, real, paper_number(row), row["command"]]
    return lines


def main(words):
    path = pathlib.Path(*words[:1] or ["out"]) / "results.jsonl"
    try:
        lines = read_scores(path)
    except (OSError, ValueError, TypeError, KeyError):
        print(f"table.py: {path} is missing or has a line that is not a score", file=sys.stderr)
        return 2
    for line in [HEAD.split(), ["---"] * 12, *(lines[key] for key in sorted(lines))]:
        print("| " + " | ".join(map(str, line)) + " |")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
