"""`export --format tall`: thresholds by agreement, the file, and what it keeps of each expert."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from adaptive_merge import __version__
from adaptive_merge.data.stream import TaskStream
from adaptive_merge.engine.module import AdaptiveMerge
from adaptive_merge.engine.views import percent
from adaptive_merge.errors import InputError
from adaptive_merge.export.card import plain
from adaptive_merge.export.folder import check_free, new_folder
from adaptive_merge.export.formats import write_heads
from adaptive_merge.export.tall_file import FILE, TallMasks, load_tall, packed_mask
from adaptive_merge.files import save_text
from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.objectives.functional import jensen_shannon

__all__ = ["GRID", "Kept", "export_tall", "table"]

GRID: Final = (0.2, 0.3, 0.4, 0.5, 0.6)
"""λ of the paper, which chose one for each task by labelled validation images."""

_CARD: Final = """# TALL-masks of {count} experts

{count} experts as one vector and a bit mask for each: expert t is θ₀ + mₜ ⊙ τ_MT with mₜ = |τₜ| > λₜ |τ_MT − τₜ|
(TALL-masks, Wang et al., ICML 2024). The task has to be known.

{table}

{size}. λ was {chosen}.

```python
import adaptive_merge as am

expert = am.load_tall("FOLDER").expert("{task}")  # a state dict; its head is in heads.safetensors
```

Written by adaptive_merge {version} with `{command}`.
"""


@dataclass(frozen=True)
class Kept:
    """What masks keep of an expert.

    Args:
        threshold: λₜ.
        density: share of the entries that its mask keeps.
        agreement: share of the unlabelled images on which expert and rebuilt expert predict the same.
        rebuilt, expert: accuracies on the scored images; None where these have no labels, all three where no image
            was read.
    """

    threshold: float
    density: float
    agreement: float | None = None
    rebuilt: float | None = None
    expert: float | None = None

    @property
    def shares(self) -> tuple[float | None, ...]:
        """All but λ."""
        return (self.density, self.agreement, self.rebuilt, self.expert)


def export_tall(
    module: AdaptiveMerge,
    folder: str | Path,
    stream: TaskStream | None = None,
    thresholds: float | Sequence[float] | None = None,
    command: str = "adaptive_merge.export.export_tall(...)",
) -> tuple[dict[str, Kept], str]:
    """Write the experts of a module as TALL-masks into a new folder; what is kept of each, and what was done in words.

    τ_MT is the unscaled sum of the transformed task vectors: task arithmetic's, or with `Ties` that of TIES. What the
    module has learned plays no part.

    Args:
        module: its experts, transforms and heads.
        folder: to write; it must not exist, or be empty.
        stream: images to choose λ by, `start_images` of each task, and to score on; None: no image is read.
        thresholds: λ of all tasks, or one each; None: for each task the one of `GRID` whose rebuilt expert agrees most
            with the expert.
        command: for the card.

    Raises:
        InputError: the folder is taken; neither images nor thresholds; a start has moved θ₀; a wrong number of λ.
    """
    check_free(Path(folder))
    if module.start is not None:
        raise InputError("masks are laid around the pre-trained weights, which a start replaces; leave out `start`")
    experts, merged = module.merged_experts, _sum(module.model.backbone.task_vectors)
    grid = _grid(experts.tasks, stream, thresholds)
    masks, kept = {}, {}
    for task in experts.tasks:
        candidates = [_masked(experts, merged, task, threshold) for threshold in grid[task]]
        masks[task], kept[task] = _best(module, stream, experts, candidates)
    chosen = {task: row.threshold for task, row in kept.items()}
    tall = TallMasks(experts.layout, experts.pretrained, merged, masks, chosen, experts.buffers)
    with new_folder(Path(folder)) as partial:
        tall.save(partial / FILE)
        load_tall(partial / FILE)
        write_heads({task: module.model.heads[task] for task in experts.tasks}, partial)
        size = _size(partial / FILE, experts)
        _write_card(partial, kept, size, thresholds is None, command)
    return kept, f"wrote tall to {folder}; {size}"


def _sum(bank: TaskVectors) -> Tensor:
    """τ_MT [P], float32."""
    merged = torch.empty(bank.layout.numel)
    for part in bank.layout.slices:
        merged[part] = bank.vectors[:, part].double().sum(0)
    return merged


def _grid(
    tasks: Sequence[str], stream: TaskStream | None, thresholds: float | Sequence[float] | None
) -> dict[str, Sequence[float]]:
    """Task → the λ to choose from."""
    if thresholds is None:
        if stream is None:
            raise InputError("the thresholds are chosen on images: give a stream, or thresholds")
        return dict.fromkeys(tasks, GRID)
    rows = [thresholds] * len(tasks) if isinstance(thresholds, (int, float)) else list(thresholds)
    if len(rows) != len(tasks) or min(rows) < 0:
        raise InputError(f"thresholds are one number ≥ 0, or one for each of the {len(tasks)} tasks; got {thresholds}")
    return {task: (float(row),) for task, row in zip(tasks, rows)}


def _masked(experts: TaskVectors, merged: Tensor, task: str, threshold: float) -> TallMasks:
    """One expert as it is rebuilt with a λ."""
    masks, thresholds = {task: packed_mask(experts, task, merged, threshold)}, {task: threshold}
    return TallMasks(experts.layout, experts.pretrained, merged, masks, thresholds, {})


def _best(
    module: AdaptiveMerge, stream: TaskStream | None, experts: TaskVectors, candidates: Sequence[TallMasks]
) -> tuple[Tensor, Kept]:
    """The mask of the candidate that agrees most with its expert; of equals that which diverges least."""
    best, (task,) = candidates[0], candidates[0].tasks
    measured: dict[str, float] = {}
    if stream is not None:
        expert, head = experts.expert(task), module.model.heads[task]
        images = [batch for _, batch in stream.start_batches(task)]
        expected = _logits(module, task, expert, images)
        found = [_logits(module, task, one.expert(task), images) for one in candidates]
        agreed = [float((head.predict(one) == head.predict(expected)).float().mean()) for one in found]
        scores = [(share, -float(jensen_shannon(one, expected).mean())) for share, one in zip(agreed, found)]
        chosen = max(range(len(scores)), key=scores.__getitem__)
        best, measured = candidates[chosen], {"agreement": agreed[chosen]}
        if stream.images[task].labels is not None:
            measured |= {"rebuilt": _accuracy(module, stream, task, best.expert(task))}
            measured |= {"expert": _accuracy(module, stream, task, expert)}
    return best.masks[task], Kept(best.thresholds[task], float(best.mask(task).float().mean()), **measured)


@torch.no_grad()
def _logits(module: AdaptiveMerge, task: str, weights: Mapping[str, Tensor], images: Iterable[Tensor]) -> Tensor:
    """Logits [U, C] of a model with these weights."""
    device = module.model.backbone.device
    own = {name: weights[name].to(device) for name in module.experts.names}
    return torch.cat([module.model(task, batch.to(device), own, adapted=False).logits for batch in images])


def _accuracy(module: AdaptiveMerge, stream: TaskStream, task: str, weights: Mapping[str, Tensor]) -> float:
    """On the images that the protocol scores; labels are read here, after all is chosen."""
    head, source = module.model.heads[task], stream.images[task]
    batches = stream.scored[task].split(stream.eval_batch_size)
    predicted = head.predict(_logits(module, task, weights, (source.take(index) for index in batches)))
    metric = head.metric()
    metric.update(predicted.cpu(), source.labels[stream.scored[task]].flatten())
    return float(metric.compute())


def _size(path: Path, experts: TaskVectors) -> str:
    """The bytes of the file, beside those of the experts one by one in float32."""
    written, apart = path.stat().st_size, 4 * experts.layout.numel * len(experts.tasks)
    return (
        f"{len(experts.tasks)} experts in {written:,} bytes, {100 * written / apart:.1f} % of the {apart:,} that they "
        "take one by one"
    )


def table(kept: Mapping[str, Kept]) -> list[tuple[str, ...]]:
    """Rows for people, the names of the columns first; a mean over the tasks last, where images were read."""
    rows = [("task", "λ", "entries kept, %", "agreement, %", "rebuilt, %", "expert, %")]
    for task, row in kept.items():
        rows.append((task, f"{row.threshold:g}", *map(_percent, row.shares)))
    columns = list(zip(*(row.shares for row in kept.values())))
    means = [None if None in column else sum(column) / len(column) for column in columns]
    return [*rows, ("average", "", *map(_percent, means))]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{percent(share):.1f}"


def _write_card(folder: Path, kept: Mapping[str, Kept], size: str, chosen: bool, command: str) -> None:
    header, *rows = table(kept)
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *((plain(task), *cells) for task, *cells in rows)]
    content = _CARD.format(
        count=len(kept),
        table="\n".join(f"| {' | '.join(line)} |" for line in lines),
        size=size,
        chosen="chosen by agreement with the experts, without labels" if chosen else "given",
        task=plain(next(iter(kept))),
        version=__version__,
        command=command,
    )
    save_text(folder / "README.md", content)
