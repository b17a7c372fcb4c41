"""GaLore with torch's AdamW, written plainly: full gradients, exact SVD, eager."""

import torch
from torch import Tensor, nn


class PlainGaLore:
    """GaLore (arXiv:2403.03507, algorithm 2) over AdamW in torch's order: decay before the update, eps after the
    bias correction of the second moment.

    Args:
        projected: weights trained in a subspace of their shorter side.
        full: parameters trained at full rank.
        rank, gap, scale: GaLore's.
        lr, betas, eps, weight_decay: AdamW's.
    """

    def __init__(
        self,
        projected: list[nn.Parameter],
        full: list[nn.Parameter],
        *,
        rank: int,
        gap: int,
        scale: float,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.projected, self.full = projected, full
        self.rank, self.gap, self.scale = rank, gap, scale
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.bases: dict[nn.Parameter, Tensor] = {}
        self.moments: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}
        self.num_updates = 0

    def projected_gradients(self) -> dict[nn.Parameter, Tensor]:
        """R of each projected weight from its full gradient, with the bases renewed where they are due."""
        projected = {}
        for weight in self.projected:
            grad = weight.grad
            assert grad is not None
            tall = weight.shape[0] >= weight.shape[1]
            if self.num_updates % self.gap == 0:
                left, _, right = torch.linalg.svd(grad, full_matrices=False)
                self.bases[weight] = right[: self.rank].T if tall else left[:, : self.rank]
            basis = self.bases[weight]
            projected[weight] = grad @ basis if tall else basis.T @ grad
        return projected

    @torch.no_grad()
    def step(self) -> None:
        """One update of everything; gradients are cleared."""
        projected = self.projected_gradients()
        self.num_updates += 1
        for weight in [*self.projected, *self.full]:
            grad = projected.get(weight, weight.grad)
            assert grad is not None
            update = self._adam(weight, grad)
            weight.mul_(1 - self.lr * self.weight_decay)
            if weight in projected:
                basis = self.bases[weight]
                tall = weight.shape[0] >= weight.shape[1]
                update = self.scale * (update @ basis.T if tall else basis @ update)
            weight.sub_(self.lr * update)
            weight.grad = None

    def _adam(self, weight: nn.Parameter, grad: Tensor) -> Tensor:
        beta1, beta2 = self.betas
        first, second = self.moments.get(weight, (torch.zeros_like(grad), torch.zeros_like(grad)))
        first = beta1 * first + (1 - beta1) * grad
        second = beta2 * second + (1 - beta2) * grad * grad
        self.moments[weight] = (first, second)
        corrected = first / (1 - beta1**self.num_updates)
        return corrected / ((second / (1 - beta2**self.num_updates)).sqrt() + self.eps)
