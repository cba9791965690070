"""Draw the measurements in results/: curves of each method, and all methods beside their papers.

    python results/plot.py            # writes curves.png, methods.png, haba_dm_curves.png

Needs matplotlib. A run is named by its distilled file, results/<stem>.pt, with its evaluations;
losses are in <stem>.csv, the final score in results.jsonl, the paper's in targets.csv.
"""

import csv
import json
import math
import pathlib
import re
import sys

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator, NullFormatter

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import table  # noqa: E402

import evaluate  # noqa: E402

RUNS = {
    "kfs_cifar10_ipc1": "KFS",
    "haba_cifar10_bpc3": "HaBa, one-channel bases",
    "haba_cifar10_bpc1": "HaBa",
    "mtt_cifar10_ipc1": "MTT",
    "frepo_cifar10_ipc1": "FRePo",
    "translator_fewshot_adapted_cifar10_ipc1": "translator",
    "dm_cifar10_ipc1": "DM",
}
# HaBa with DM's objective and as many images without hallucinators as it stores
PAIR = {
    "haba_dm_cifar10_bpc1": "one basis, five hallucinators",
    "haba_dm_cifar10_bpc2": "two images",
}
COLOR = "#0b6e99"
GRAY = "#777777"
COLUMNS = 4


def read_run(stem):
    """The score of a file by its own protocol -> row, losses (n, 2), storage in images."""
    distilled = evaluate.read_distilled(HERE / f"{stem}.pt")
    images = distilled["stored_per_class"] / np.prod(distilled["shape"])
    rows = map(json.loads, (HERE / "results.jsonl").read_text().splitlines())
    same = ("method", "dataset", "per_class", "iterations", "settings")
    # as in JSON, where tuples are lists
    ours = json.loads(json.dumps({name: distilled[name] for name in same}))
    rows = [row for row in rows if all(row.get(name) == ours[name] for name in same)]
    # a file may have been scored in other networks or with other epochs, too
    rows = [row for row in rows if not re.search("--(network|epochs|corr)", row["command"])]
    # the last one of those with the most networks
    row = max(reversed(rows), key=lambda row: row["runs"])
    with (HERE / f"{stem}.csv").open() as file:
        losses = [(int(line["iteration"]), float(line["loss"])) for line in csv.DictReader(file)]
    paper = table.paper_number(row)
    row["paper"] = float(paper.split()[0]) if paper else None
    row["evaluations"] = distilled["evaluations"]
    return row, np.array(losses), images


def smooth(values, share=0.1):
    """Centered running mean over a share of the values, over fewer at the ends."""
    found = []
    for i in range(len(values)):
        reach = min(i, len(values) - 1 - i, int(len(values) * share / 2))
        found.append(values[i - reach : i + reach + 1].mean())
    return found


def label(axes, x, y, text, color, **more):
    axes.annotate(text, (x, y), (0, 2), textcoords="offset points", color=color, fontsize=8, **more)


def draw_run(accuracy, loss, row, losses, color):
    """Evaluations and final score over iterations; the loss, also smoothed -> its last value."""
    if row["evaluations"]:
        accuracy.plot(*zip(*row["evaluations"], strict=True), ".-", color=color, lw=1.2, ms=4)
    score = (row["iterations"], row["accuracy"], row["std"])
    accuracy.errorbar(*score, fmt="o", color=color, ms=4, capsize=2)
    smoothed = smooth(losses[:, 1])
    loss.plot(losses[:, 0], losses[:, 1], color=color, lw=0.6, alpha=0.3)
    loss.plot(losses[:, 0], smoothed, color=color, lw=1.2)
    for axes in (accuracy, loss):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(which="both", labelsize=8)
    return smoothed[-1]


def draw_panel(accuracy, loss, title, row, losses):
    """Accuracy over iterations above, the smoothed loss below."""
    end = row["iterations"]
    left = min(10, losses[0, 0])
    accuracy.set_title(title, loc="left", fontsize=10, fontweight="bold")
    draw_run(accuracy, loss, row, losses, COLOR)
    label(accuracy, end, row["accuracy"] + row["std"], f"{row['accuracy']:.1f}", COLOR, ha="right")
    if row["paper"]:
        accuracy.axhline(row["paper"], color=GRAY, ls="--", lw=1)
        label(accuracy, left, row["paper"], f"paper {row['paper']:.1f}", GRAY)
    accuracy.axhline(row["random"], color=GRAY, ls=":", lw=1)
    label(accuracy, left, row["random"], f"random real images {row['random']:.1f}", GRAY)
    top = max(row["accuracy"], row["paper"] or 0)
    accuracy.set(ylabel="test accuracy, %", ylim=(0, top * 1.15))
    loss.set(ylabel="loss", xscale="log", xlim=(left, end * 1.3), xlabel="iterations")
    loss.yaxis.set_major_locator(MaxNLocator(3))
    loss.xaxis.set_minor_formatter(NullFormatter())


def draw_methods(axes, found):
    """A line a method: ours, the paper, random real images of the same storage."""
    found = sorted(found, key=lambda run: run[1]["accuracy"])
    for y, (_, row, *_) in enumerate(found):
        axes.plot([row["random"], row["accuracy"]], [y, y], color=COLOR, lw=1, alpha=0.3, zorder=0)
        axes.errorbar(row["accuracy"], y, xerr=row["std"], fmt="o", color=COLOR, ms=7)
        axes.plot(row["random"], y, "|", color=GRAY, ms=10)
        if row["paper"]:
            axes.plot(row["paper"], y, "D", mfc="none", color="black", ms=7)
        label(axes, row["accuracy"], y + 0.14, f"{row['accuracy']:.1f}", COLOR, ha="center")
    names = [f"{title}\nstorage {images:.2f}" for title, _, _, images in found]
    axes.set_yticks(range(len(found)), names, fontsize=9)
    axes.set(xlabel="test accuracy on CIFAR-10, %", ylim=(-0.6, len(found) - 0.2), xlim=(10, None))
    title, row, *_ = found[-1]
    y = len(found) - 1
    label(axes, row["random"], y + 0.14, "random real images", GRAY, ha="center")
    if row["paper"]:
        label(axes, row["paper"], y - 0.4, "paper", "black", ha="center")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def draw_pair(accuracy, loss):
    """Accuracy and smoothed loss of the runs of PAIR over iterations."""
    for (stem, title), color in zip(PAIR.items(), (COLOR, GRAY), strict=True):
        row, losses, _ = read_run(stem)
        end = row["iterations"]
        last = draw_run(accuracy, loss, row, losses, color)
        label(accuracy, end, row["accuracy"] + row["std"], f"{row['accuracy']:.1f}", color)
        label(loss, end, 1.07 * last, title, color, ha="right")
    accuracy.set(ylabel="test accuracy, %", xlabel="iterations")
    loss.set(ylabel="loss", xlabel="iterations", yscale="log")
    loss.yaxis.set_minor_formatter("{x:.0f}")


def main():
    found = []
    for stem, title in RUNS.items():
        if (HERE / f"{stem}.pt").exists():
            found.append((title, *read_run(stem)))
    rows = math.ceil(len(found) / COLUMNS)
    figure = plt.figure(figsize=(3 * COLUMNS, 3.8 * rows), layout="constrained")
    cells = figure.subfigures(rows, COLUMNS).flatten()
    for cell, (title, row, losses, _) in zip(cells, found, strict=False):
        draw_panel(*cell.subplots(2, height_ratios=(2, 1), sharex=True), title, row, losses)
    figure.savefig(HERE / "curves.png", dpi=110)
    figure, axes = plt.subplots(figsize=(8, 0.62 * len(found) + 0.9), layout="constrained")
    draw_methods(axes, found)
    figure.savefig(HERE / "methods.png", dpi=110)
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    draw_pair(*axes)
    figure.savefig(HERE / "haba_dm_curves.png", dpi=110)


if __name__ == "__main__":
    main()
