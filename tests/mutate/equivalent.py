"""Changes that no test can see, or that none should look at; each with its reason.

An entry is found by its file and the text of the changed line, or by the function around it; never by a line number.
"""

from dataclasses import dataclass

from tests.mutate.mutants import Mutant


@dataclass(frozen=True)
class Equivalent:
    """Mutants of one line or one function, all of them, or those alone that turn `old` into `new`."""

    path: str
    reason: str
    source: str | None = None
    """The text of the changed line, without the space around it."""
    within: str | None = None
    """The dotted name of a function or class."""
    old: str | None = None
    new: str | None = None

    def covers(self, mutant: Mutant) -> bool:
        """Return whether the mutant is one of these."""
        around = f"{mutant.within}.".startswith(f"{self.within}.")
        return (
            mutant.path == self.path
            and (self.source is None or mutant.source == self.source)
            and (self.within is None or around)
            and (self.old is None or mutant.old == self.old)
            and (self.new is None or mutant.new == self.new)
        )


def is_equivalent(mutant: Mutant) -> bool:
    """Return whether the list below has the mutant."""
    return any(entry.covers(mutant) for entry in EQUIVALENT)


GPU = "runs on a CUDA device alone; the tests have none"
SPEED = "another way to the same numbers: they are equal by design, and tested to be"
ONE_BEAM = "a single beam continues itself: gathering it changes nothing, and costs a copy each step"
WORDS = "chooses the words of a message"
EQUIVALENT: tuple[Equivalent, ...] = (
    *(
        Equivalent("florence2/evaluate/metrics/boxes.py", "two boxes overlap both ways alike", within=within, new=new)
        for within, new in (
            ("is_right", "box_ious(truths, boxes[:1])"),
            ("box_ious", "np.minimum(second[..., 2:], first[..., 2:])"),
            ("box_ious", "np.maximum(second[..., :2], first[..., :2])"),
        )
    ),
    Equivalent(
        "florence2/evaluate/running.py",
        "asks whether a run was stopped, which is 130",
        source="if worst > 1:",
        new="2",
    ),
    *(
        Equivalent("florence2/evaluate/tables/catalogue.py", "estimates the size of a file", within=within, old=size)
        for within, sizes in (
            *(("_karpathy", "144"), ("_nocaps", "5 1500"), ("_textcaps", "14"), ("_detection", "20 816")),
            *(("_entities", "20 60 0.1 4400"), ("_expressions", "50 100"), ("_vqav2", "25 11 190 13500")),
            *(("_textvqa", "16 930"), ("_vizwiz", "5 1 3000")),
        )
        for size in sizes.split()
    ),
    Equivalent(
        "florence2/model/config.py",
        "counts positions, whose number is the same for an image on its side",
        source="rows, columns = self.grid_size(height, width)",
        within="VisionConfig.image_tokens",
        new="self.grid_size(width, height)",
    ),
    Equivalent("florence2/checkpoints/checks/comparison.py", WORDS, within="_word"),
    Equivalent(
        "florence2/bulk/lock.py",
        "is Windows' way to lock, which the tests' machines do not run",
        source="os.lseek(descriptor, 1 << 20, os.SEEK_SET)",
    ),
    Equivalent(
        "florence2/fast/packed.py",
        SPEED,
        source="pairs = values.numel() % 2 == 0 and values.storage_offset() % 2 == 0",
        new="(values.storage_offset() // 2)",
    ),
    Equivalent(
        "florence2/answers/parsing.py",
        "no quad ends before the end of its eight locations",
        source="last = max((run.end() for run in _QUADS.finditer(cleaned.text)), default=0)",
        new="1",
    ),
    Equivalent(
        "florence2/answers/drawing.py",
        "Pillow draws a line of width 0 one pixel wide as well",
        source="thickness = max(1, round(min(canvas.size) / _LINES_PER_SIDE))",
        old="1",
        new="0",
    ),
    Equivalent(
        "florence2/checkpoints/tensors.py",
        "from torch 2.6 on this is the default",
        within="_unpickle",
        new="torch.load(path, map_location='cpu')",
    ),
    Equivalent(
        "florence2/checkpoints/tensors.py",
        "from torch 2.6 on this is the default",
        within="_unpickle",
        new="torch.load(path, map_location='cpu', mmap=True)",
    ),
    Equivalent(
        "florence2/tracing/patches.py",
        "a value of the same shape is repeated once, which is the value",
        source="if of_batch or new.shape == value.shape:",
        new="of_batch",
    ),
    Equivalent("florence2/model/cache.py", ONE_BEAM, source="if self.beams > 1:", new="(self.beams >= 1)"),
    Equivalent("florence2/model/cache.py", ONE_BEAM, source="if self.beams > 1:", new="0"),
    Equivalent(
        "florence2/model/cache.py",
        "the ancestry of a single beam holds every slot that is written, so as a mask it changes nothing",
        source="mask = None if self.beams == 1 else self.ancestry[:, None, :, :end]  # (B, 1, K, slots)",
        new="0",
    ),
    Equivalent(
        "florence2/model/attention.py",
        "dropout at rate 0 changes no number; an exporter alone sees the difference, and tests/export sees that",
        source='return trace("heads", F.dropout(weights, dropout, training=dropout > 0) @ value)',
        old="dropout > 0",
    ),
    Equivalent("florence2/fast/packed.py", SPEED, source="if len(copy.sizes) == 1:", old="1", new="0"),
    Equivalent(
        "florence2/train/memory.py",
        GPU,
        within="_without_data",
        new="torch.empty(value.shape, dtype=value.dtype, requires_grad=value.requires_grad)",
    ),
    Equivalent(
        "florence2/train/memory.py",
        "a layer that keeps as much as its input lowers no peak, and is left out below",
        within="UpdateMemory.worth_recomputing",
        new="(layer.inside >= layer.input)",
    ),
    Equivalent(
        "florence2/train/store/grids.py",
        "any number of digits names a shard",
        source='name = hashlib.sha256("".join(named).encode()).hexdigest()[:16]',
        old="16",
    ),
    Equivalent("florence2/fast/cuda/recorded/graphs.py", GPU, within="record_cuda_graph"),
    Equivalent("florence2/fast/cuda/recorded/graphs.py", GPU, within="CudaGraph"),
    Equivalent("florence2/fast/cuda/recorded/graphs.py", GPU, within="stream_of"),
    Equivalent("florence2/fast/cuda/recorded/lane.py", GPU, source='on_cuda = done.device.type == "cuda"'),
    Equivalent("florence2/fast/cuda/recorded/lane.py", GPU, source="if copied is not None:"),
    Equivalent("florence2/fast/cuda/recorded/slots.py", GPU, within="row_indices"),
    Equivalent(
        "florence2/generation/search.py",
        "no sum gets there within 1,024 ids",
        source="_NOT_STARTED = -1e9",
        new="2000000000.0",
    ),
)
