"""Plot the learning curve of a run."""

import json
from pathlib import Path


def plot_log(log: Path, target: Path) -> None:
    """Plot loss and learning rate of a `log.jsonl` over the updates into `target` (.png, .svg or .pdf)."""
    from matplotlib.figure import Figure  # slow to import

    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    losses = [row for row in rows if "loss" in row]
    steps = [row["step"] for row in losses]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, [row["loss"] for row in losses], color="tab:blue")
    axes.set(xlabel="update", ylabel="loss per label", yscale="log")
    rates = axes.twinx()
    rates.plot(steps, [row["learning_rate"] for row in losses], color="tab:gray", linestyle=":")
    rates.set(ylabel="learning rate")
    figure.savefig(target, dpi=120)
