"""Merge and gradient over banks of 10, 20 and 100 synthetic experts: CPU time of one thread, and bytes, by T.

python scripts/many_experts.py [parameters, default 2000000]
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Final

import torch

from adaptive_merge.merge.layout import Layout
from adaptive_merge.merge.passes import combine, project
from adaptive_merge.merge.task_vectors import TaskVectors

EXPERTS: Final = (10, 20, 100)
GROUPS: Final = 40
ROUNDS: Final = 15


def main(parameters: int) -> None:
    """Print a row for each number of experts; they take turns, so that other load meets all alike."""
    torch.set_num_threads(1)
    size = parameters // GROUPS
    layout = Layout(tuple(f"w{index}" for index in range(GROUPS)), ((size,),) * GROUPS)
    banks = {
        count: TaskVectors(
            [f"task{index}" for index in range(count)],
            layout,
            torch.randn(layout.numel),
            torch.randn(count, layout.numel),
            {},
        )
        for count in EXPERTS
    }
    gradients, out = torch.randn(layout.numel).split(size), torch.empty(layout.numel)
    times: dict[int, list[float]] = {count: [] for count in banks}
    for _ in range(ROUNDS):
        for count, bank in banks.items():
            start = time.process_time()
            combine(bank, torch.full((count, GROUPS), 0.3), range(GROUPS), out)
            project(bank, gradients, range(GROUPS), GROUPS)
            times[count].append(time.process_time() - start)
    for count, bank in banks.items():
        typical = statistics.median(times[count])
        held = bank.pretrained.nbytes + bank.vectors.nbytes
        sys.stdout.write(
            f"T = {count:3}: {1e3 * typical:5.1f} ms, {2 * held / typical / 1e9:4.1f} GB/s read, {held / 1e6:.0f} MB\n"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2_000_000)
