"""The learning curve of a run as a picture."""

import json
from pathlib import Path


def plot_log(log: Path, picture: Path) -> None:
    """Loss and learning rate of `log.jsonl` over the updates, written to `picture` (.png, .svg or .pdf)."""
    from matplotlib.figure import Figure  # its import takes longer than everything else here

    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    losses = [row for row in rows if "loss" in row]
    steps = [row["step"] for row in losses]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, [row["loss"] for row in losses], color="tab:blue")
    axes.set(xlabel="update", ylabel="loss of a label", yscale="log")
    rates = axes.twinx()
    rates.plot(steps, [row["learning_rate"] for row in losses], color="tab:gray", linestyle=":")
    rates.set(ylabel="learning rate")
    figure.savefig(picture, dpi=120)
