"""A rule as a user writes it, in a file of their own: a Concrete mask, one logit per entry, shared by all tasks.

θ = θ₀ + λ Σₜ τₜ ⊙ m / mean(m), with the mean over each tensor and m = σ((x + log u − log(1 − u)) / temperature) in
training, without the noise in evaluation (Concrete Subspace Learning, Tang et al., 2023).
"""

from __future__ import annotations

import torch
from torch import nn

import adaptive_merge as am


class ConcreteMask(am.Rule):
    def __init__(self, scale: float = 0.3, temperature: float = 0.5, seed: int = 0) -> None:
        super().__init__()
        self.scale, self.temperature, self.seed = scale, temperature, seed
        self.register_buffer("draws", torch.zeros((), dtype=torch.long))

    def bind(self, task_vectors):
        self.tasks, self.sizes = task_vectors.tasks, [part.stop - part.start for part in task_vectors.layout.slices]
        self.logits = nn.Parameter(torch.zeros(sum(self.sizes)))
        return self

    def state(self):
        noise = self._noise() if self.training else 0.0
        masks = torch.sigmoid((self.logits + noise) / self.temperature).split(self.sizes)
        return (torch.cat([mask / mask.mean() for mask in masks]),)

    def _noise(self):
        self.draws += 1
        generator = torch.Generator().manual_seed(1000 * self.seed + int(self.draws))
        uniform = torch.rand(self.logits.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
        return uniform.logit().to(self.logits.device)

    @torch.no_grad()
    def combine(self, part, state, out):
        mask = self.scale * state[0][part.columns]
        torch.addcmul(part.bank.pretrained, part.bank.vectors.float().sum(0), mask, out=out)

    @torch.no_grad()
    def project(self, part, gradients, state, out):
        flat = torch.zeros_like(part.bank.pretrained)
        for gradient, place in zip(gradients, part.bank.layout.slices):
            if gradient is not None:
                flat[place] = gradient.reshape(-1)
        out[0][part.columns] += self.scale * flat * part.bank.vectors.float().sum(0)
