"""Audit a checkpoint: measure and hash every tensor, one after another, and list their problems.

Loading refuses a damaged checkpoint; an audit says where the damage is. It uses canonical names and the orientation of
the model, so that both layouts, sharded or not, give the same audit.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from florence2.checkpoints.checkpoint import OPTIONAL, checkpoint_folder, find_misfits
from florence2.checkpoints.config_files import read_config
from florence2.checkpoints.describe import own_tensors, read_stored, stored_names, weights_layout
from florence2.checkpoints.tensors import WeightFiles, find_weights
from florence2.errors import ConfigError
from florence2.inspect.audit.measures import (
    NO_UNITS,
    Spectrum,
    Units,
    Values,
    as_matrix,
    find_dead,
    hash_all,
    hash_tensor,
    measure_spectrum,
    measure_values,
)
from florence2.inspect.progress import ProgressCallback, ignore_progress
from florence2.model.config import Florence2Config

_LAYER = re.compile(
    r"vision_tower\.(convs\.[0-9]+|blocks\.[0-9]+\.[0-9]+)|multi_modal_projector|language_model\.(encoder|decoder)\.layers\.[0-9]+"
    r"|language_model\.\w+|[^.]+"
)
_PARTS = ("vision_tower", "multi_modal_projector", "language_model.shared", "language_model.enc", "language_model.dec")


@dataclass(frozen=True)
class TensorAudit:
    """One tensor: `stored` are its names in the files, several where it is tied.

    `spectrum` is None where it was not requested, for vectors, biases and computed tables, and where values are not
    finite. Dead units are counted in learned weights and in the scales of norms.
    """

    name: str
    stored: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    parameters: int
    values: Values
    spectrum: Spectrum | None
    dead_rows: Units
    dead_columns: Units
    sha256: str

    @property
    def non_finite(self) -> int:
        """The number of values that are NaN or infinite."""
        return self.values.nan + self.values.infinite


@dataclass(frozen=True)
class ModuleAudit:
    """One layer, block or table, named by the path that its tensors share."""

    name: str
    tensors: int
    parameters: int
    dtypes: tuple[str, ...]
    norm: float
    zeros: int
    non_finite: int
    dead: int
    largest: float | None
    """The largest singular value of any of its maps."""
    effective_rank: float | None
    """The effective rank of its maps as a share of the full rank, averaged over the maps."""


@dataclass(frozen=True)
class AuditFinding:
    """A fact worth knowing, in one sentence; loading refuses a checkpoint with a `problem`."""

    kind: str
    problem: bool
    message: str


@dataclass(frozen=True)
class Audit:
    """The audit of a whole checkpoint. `config` is None when `config.json` cannot be read, which is a finding.

    `sha256` covers the lines "HASH  NAME" of all tensors sorted by name, without a `final_logits_bias` of zeros: equal
    weights of one type have the same hash in every layout and split into files.
    """

    path: str
    layout: str
    dtypes: Mapping[str, int]
    parameters: int
    sha256: str
    config: Florence2Config | None
    modules: tuple[ModuleAudit, ...]
    tensors: tuple[TensorAudit, ...]
    equal: tuple[tuple[str, ...], ...]
    """Groups of different tensors that are equal bit for bit, except constants."""
    findings: tuple[AuditFinding, ...]

    @property
    def problems(self) -> tuple[AuditFinding, ...]:
        """The findings for which loading refuses the checkpoint."""
        return tuple(finding for finding in self.findings if finding.problem)

    @property
    def parts(self) -> dict[str, int]:
        """The number of parameters of each part of the model: vision tower, projector, embedding, encoder, …"""
        sizes: Counter[str] = Counter()
        for module in self.modules:
            words = module.name.split(".")
            sizes[".".join(words[: 2 if words[0] == "language_model" else 1])] += module.parameters
        return dict(sizes)

    @property
    def tied(self) -> dict[str, tuple[str, ...]]:
        """The tensors that are stored under several names, with these names."""
        return {tensor.name: tensor.stored for tensor in self.tensors if len(tensor.stored) > 1}

    def to_dict(self) -> dict[str, Any]:
        """Return everything except the configuration, as JSON-safe values: NaN and infinities become None."""
        values: dict[str, Any] = to_plain(asdict(self)) | {"parts": self.parts}
        del values["config"]
        return values


def audit(
    path: Path, *, spectra: bool = True, allow_pickle: bool = False, progress: ProgressCallback | None = None
) -> Audit:
    """Measure every tensor of a checkpoint, one at a time.

    Args:
        path: A folder, a weight file, or an index of shards.
        spectra: Also compute singular values, which takes most of the time.
        allow_pickle: Read a .bin file where no safetensors exist.
        progress: Called as progress(done, total), first with 0 and then after each tensor.

    Returns:
        The audit. Anything that is wrong with readable tensors is a finding, not an error.

    Raises:
        CheckpointError: No weights exist, a file is damaged, or the names are not those of Florence-2.
    """
    files = find_weights(path, allow_pickle)
    names = sorted_names(stored_names(files, own_tensors(files)))
    tensors: list[TensorAudit] = []
    findings: list[AuditFinding] = []
    stored = [name for group in names.values() for name in group]
    source = read_stored(files, stored)
    report = progress or ignore_progress
    report(0, len(names))
    for done, (name, group) in enumerate(names.items(), 1):
        tensor = next(source)
        tensors.append(_measure(name, group, tensor, spectra))
        del tensor
        unequal = [alias for alias in group[1:] if hash_tensor(next(source)) != tensors[-1].sha256]
        findings += [_untied(group[0], alias) for alias in unequal]
        report(done, len(names))
    config, misfits = _check(path, files)
    findings += misfits + [finding for tensor in tensors for finding in _look_at(tensor)]
    equal = _find_equal(tensors)
    findings += [_equal(group) for group in equal]
    return _put_together(path, files, config, tensors, equal, findings)


def _put_together(
    path: Path,
    files: WeightFiles,
    config: Florence2Config | None,
    tensors: Sequence[TensorAudit],
    equal: tuple[tuple[str, ...], ...],
    findings: Sequence[AuditFinding],
) -> Audit:
    dtypes: Counter[str] = Counter()
    for tensor in tensors:
        dtypes[tensor.dtype] += tensor.parameters
    return Audit(
        path=str(path),
        layout=weights_layout(files, files.read_headers()),
        dtypes=dict(dtypes.most_common()),
        parameters=sum(dtypes.values()),
        sha256=hash_all([(tensor.name, tensor.sha256) for tensor in tensors if not is_absent_zero(tensor)]),
        config=config,
        modules=tuple(_sum_up(name, group) for name, group in group_by_layer(tensors).items()),
        tensors=tuple(tensors),
        equal=equal,
        findings=tuple(sorted(findings, key=lambda finding: not finding.problem)),
    )


def is_absent_zero(tensor: TensorAudit) -> bool:
    """Return whether a tensor has the same effect as its absence."""
    return tensor.name in OPTIONAL and tensor.values.zeros == tensor.parameters


def sorted_names(names: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Sort canonical names in the order of computation, numbers as numbers, with unknown names last."""
    return {name: names[name] for name in sorted(names, key=_place)}


def _place(name: str) -> tuple[Any, ...]:
    part = next((i for i, start in enumerate(_PARTS) if name.startswith(start)), len(_PARTS))
    # a stage's convolution comes before its blocks
    name = re.sub(r"^vision_tower\.(c|b)\w+\.([0-9]+)", lambda m: f"{m[2]}.{'0' if m[1] == 'c' else '1'}", name)
    return (part, name.startswith("unknown: "), [(int(w), "") if w.isdecimal() else (-1, w) for w in name.split(".")])


def group_by_layer(tensors: Iterable[Any]) -> dict[str, list[Any]]:
    """Group anything with a `name` by its layer, block or table, in the given order."""
    groups: dict[str, list[Any]] = {}
    for tensor in tensors:
        found = _LAYER.match(tensor.name)
        groups.setdefault(found[0] if found else tensor.name, []).append(tensor)
    return groups


def to_plain(value: Any) -> Any:
    """Return a JSON-safe copy: tuples become lists, NaN and infinities become None."""
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_weight(name: str) -> bool:
    """Return whether a tensor is a learned map, table or scale of a norm, not a bias or computed."""
    return name.endswith(".weight")


def _measure(name: str, stored: tuple[str, ...], tensor: Tensor, spectra: bool) -> TensorAudit:
    matrix = as_matrix(tensor)
    values = measure_values(matrix)
    wanted = spectra and is_weight(name) and not (values.nan or values.infinite)
    rows, columns = find_dead(tensor) if is_weight(name) else (NO_UNITS, NO_UNITS)
    return TensorAudit(
        name=name,
        stored=stored,
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        parameters=tensor.numel(),
        values=values,
        spectrum=measure_spectrum(matrix) if wanted else None,
        dead_rows=rows,
        dead_columns=columns,
        sha256=hash_tensor(tensor),
    )


def _sum_up(name: str, tensors: Sequence[TensorAudit]) -> ModuleAudit:
    spectra = [tensor.spectrum for tensor in tensors if tensor.spectrum is not None]
    return ModuleAudit(
        name=name,
        tensors=len(tensors),
        parameters=sum(tensor.parameters for tensor in tensors),
        dtypes=tuple(dict.fromkeys(tensor.dtype for tensor in tensors)),
        norm=math.hypot(*(tensor.values.norm for tensor in tensors)),
        zeros=sum(tensor.values.zeros for tensor in tensors),
        non_finite=sum(tensor.non_finite for tensor in tensors),
        dead=sum(tensor.dead_rows.count + tensor.dead_columns.count for tensor in tensors),
        largest=max((spectrum.largest for spectrum in spectra), default=None),
        effective_rank=sum(s.effective_rank / s.side for s in spectra) / len(spectra) if spectra else None,
    )


def _check(path: Path, files: WeightFiles) -> tuple[Florence2Config | None, list[AuditFinding]]:
    """Return the configuration, and a finding for every weight that does not fit it."""
    try:
        config = read_config(checkpoint_folder(path))
    except ConfigError as error:
        return None, [AuditFinding("config", True, f"{error} Shapes could not be compared with it.")]
    return config, [AuditFinding("shape", True, problem) for problem in find_misfits(files, config)]


def _look_at(tensor: TensorAudit) -> list[AuditFinding]:
    """Return the findings of one tensor."""
    values, findings = tensor.values, []
    if tensor.non_finite:
        message = f"{tensor.name} holds {values.nan:,} NaN and {values.infinite:,} infinite of {tensor.parameters:,}"
        findings.append(AuditFinding("non-finite", True, message))
    if is_weight(tensor.name) and values.zeros == tensor.parameters:
        return [*findings, AuditFinding("zero", False, f"{tensor.name} is zero everywhere")]
    for units, kind, total in (
        (tensor.dead_rows, "rows" if len(tensor.shape) > 1 else "scales", tensor.shape[:1]),
        (tensor.dead_columns, "columns", tensor.shape[1:2]),
    ):
        if units.count:
            which = ", ".join(map(str, units.first)) + (", ..." if units.count > len(units.first) else "")
            message = f"{tensor.name}: {units.count:,} of {total[0]:,} {kind} are dead ({which})"
            findings.append(AuditFinding("dead", False, message))
    return findings


def _untied(first: str, alias: str) -> AuditFinding:
    message = f"the token embedding is stored under several names, but {alias} is not equal bit for bit to {first}"
    return AuditFinding("tie", True, message)


def _find_equal(tensors: Iterable[TensorAudit]) -> tuple[tuple[str, ...], ...]:
    groups: dict[str, list[str]] = {}
    for tensor in tensors:
        if tensor.values.minimum != tensor.values.maximum:  # zero biases and unit scales are equal by initialisation
            groups.setdefault(tensor.sha256, []).append(tensor.name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _equal(names: Sequence[str]) -> AuditFinding:
    return AuditFinding("equal", False, f"{' and '.join(names)} are equal bit for bit")
