"""Plot the learning curve of a run."""

from pathlib import Path

from florence2.checkpoints.files import written_whole
from florence2.train.run_log import read_log


def plot_log(log: Path, target: Path) -> None:
    """Plot loss and learning rate of a `log.jsonl` over the updates into `target` (.png, .svg or .pdf)."""
    from matplotlib.figure import Figure  # slow to import

    losses = [row for row in read_log(log) if "loss" in row]
    steps = [row["step"] for row in losses]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, [row["loss"] for row in losses], color="tab:blue")
    axes.set(xlabel="update", ylabel="loss per label", yscale="log")
    rates = axes.twinx()
    rates.plot(steps, [row["learning_rate"] for row in losses], color="tab:gray", linestyle=":")
    rates.set(ylabel="learning rate")
    with written_whole(target) as draft:
        figure.savefig(draft, dpi=120, format=target.suffix.removeprefix("."))
