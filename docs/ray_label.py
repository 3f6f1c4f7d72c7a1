"""Label a folder of images with Ray Data; run it again after a stop, and it does the rest.

    python docs/ray_label.py photos out --model base --task "<OD>" --actors 8 --gpus 1

`out` holds Parquet files with the columns of `florence2 dataset --to parquet`, and `out.checkpoint` the paths that are
finished. On a cluster both must be where every machine reads and writes them, such as a network file system.
"""

import argparse
from pathlib import Path

import ray
from ray.data.checkpoint import CheckpointConfig

from florence2.inputs.formats import image_suffixes
from florence2.ray import Labeler


def label(
    folder: Path, out: Path, labeler: dict[str, object], actors: int = 1, gpus: float = 0, batch_size: int = 64
) -> None:
    """Answer a question about every image of a folder that no earlier run has answered."""
    cpus = ray.cluster_resources().get("CPU", 0)
    if cpus < actors + 2:  # Ray would wait without end
        raise SystemExit(
            f"Ray has {cpus:g} CPUs, but --actors {actors} needs {actors + 2}: one for each actor, one to read images, "
            "and one to skip finished ones."
        )
    context = ray.data.DataContext.get_current()
    context.checkpoint_config = CheckpointConfig(
        id_column="path", checkpoint_path=f"{out.absolute()}.checkpoint", delete_checkpoint_on_success=False
    )
    suffixes = [suffix.removeprefix(".") for suffix in image_suffixes()]
    # bytes: ray.data.read_images would turn and convert the images in its own way, and stop at a broken one
    images = ray.data.read_binary_files(str(folder.absolute()), include_paths=True, file_extensions=suffixes)
    answers = images.map_batches(
        Labeler,
        fn_constructor_kwargs=labeler,
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_gpus=gpus,
        udf_modifying_row_count=False,
    )
    answers.write_parquet(str(out.absolute()))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(";")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="base")
    parser.add_argument("--task", default="<CAPTION>")
    parser.add_argument("--actors", type=int, default=1, help="processes with a model each (default: 1)")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of each actor, such as 1 or 0.5 (default: 0)")
    parser.add_argument("--batch", type=int, default=64, help="images that an actor gets at once (default: 64)")
    options = parser.parse_args()
    ray.init()  # an existing cluster, as RAY_ADDRESS says, or this machine
    labeler = {"model": options.model, "task": options.task}
    label(options.folder, options.out, labeler, options.actors, options.gpus, options.batch)


if __name__ == "__main__":
    main()
