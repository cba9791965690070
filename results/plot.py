"""Draw loss and accuracy curves of a folder of results. Optional: needs matplotlib.

    python results/plot.py out              # writes out/curves.png

Loss: each <stem>.csv of a distillation (iteration,loss,seconds). Accuracy over iterations (points:
final scores, lines: --eval-every), over levels of corruption and over the classes of continual
learning: results.jsonl.
"""

import csv
import json
import pathlib
import sys

import matplotlib.pyplot as plt


def draw_losses(axes, folder):
    for path in sorted(folder.glob("*.csv")):
        with path.open() as file:
            rows = list(csv.DictReader(file))
        if rows and "loss" in rows[0]:
            steps = [int(row["iteration"]) for row in rows]
            axes.plot(steps, [float(row["loss"]) for row in rows], label=path.stem)
    axes.set(title="loss", xlabel="iterations", yscale="log")


def draw_accuracies(panels, rows):
    """One panel for each kind of row."""
    scores = {}
    for row in rows:
        settings = row.get("settings", {})
        kinds = [settings.get(name) for name in ("mode", "objective", "scoring")]
        method = " ".join([row["method"], *filter(None, kinds)])
        name = f"{method}, {row['dataset']}, {row['per_class']} per class, "
        name += f"{row['network']}, {row['epochs']} epochs"
        if row.get("evaluations"):
            panels[0].plot(*zip(*row["evaluations"], strict=True), label=f"{name}, one network")
        if row.get("kind") == "corruption":
            panels[1].errorbar(range(6), row["accuracy"], row["std"], label=name)
        elif row.get("kind") == "continual":
            panels[2].errorbar(row["classes_seen"], row["accuracy"], row["std"], label=name)
        else:
            scores.setdefault(name, []).append((row["iterations"], row["accuracy"], row["std"]))
    for name, points in scores.items():
        steps, means, stds = zip(*sorted(points), strict=True)
        panels[0].errorbar(steps, means, stds, fmt="o", capsize=3, label=name)
    for axes, label in zip(panels, ("iterations", "corruption level", "classes"), strict=True):
        axes.set(title="test accuracy, %", xlabel=label)


def main():
    folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "out")
    figure, panels = plt.subplots(1, 4, figsize=(20, 5), layout="constrained")
    draw_losses(panels[0], folder)
    if (folder / "results.jsonl").exists():
        lines = (folder / "results.jsonl").read_text().splitlines()
        draw_accuracies(panels[1:], [json.loads(line) for line in lines])
    for axes in panels:
        axes.set_visible(axes.has_data())
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    figure.savefig(folder / "curves.png", dpi=100, bbox_inches="tight")


if __name__ == "__main__":
    main()
