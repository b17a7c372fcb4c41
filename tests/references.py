"""GaLore with torch's AdamW, written plainly: full gradients, exact SVD, eager."""

import torch
from torch import Tensor, nn


class PlainGaLore:
    """GaLore (arXiv:2403.03507, algorithm 2) over AdamW in torch's order: decay before the update, eps after the
    bias correction of the second moment.

    Args:
        projected: weights trained in a subspace of their shorter side.
        full: parameters trained at full rank.
        rank, gap, scale: GaLore's; without a gap ``bases`` are given from outside.
        lr, betas, eps, weight_decay: AdamW's.
    """

    def __init__(
        self,
        projected: list[nn.Parameter],
        full: list[nn.Parameter],
        *,
        rank: int,
        gap: int | None,
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
            if self.gap is not None and self.num_updates % self.gap == 0:
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


class PlainLotus(PlainGaLore):
    """GaLore whose bases are renewed where the gradient inside them has stopped moving.

    Args:
        interval, threshold: Lotus's eta and gamma.
        Others as of ``PlainGaLore``.
    """

    def __init__(self, *args: object, interval: int, threshold: float, **settings: object) -> None:
        super().__init__(*args, gap=10**9, **settings)  # type: ignore[arg-type]
        self.interval, self.threshold = interval, threshold
        self.due, self.num_refreshes = set(self.projected), 0
        self.ages: dict[nn.Parameter, int] = {}
        self.first: dict[nn.Parameter, Tensor] = {}

    def projected_gradients(self) -> dict[nn.Parameter, Tensor]:
        """As of ``PlainGaLore``, with a renewal in the update after the one that has met the criterion."""
        for weight in self.due:
            tall = weight.shape[0] >= weight.shape[1]
            left, _, right = torch.linalg.svd(weight.grad, full_matrices=False)
            self.bases[weight] = right[: self.rank].T if tall else left[:, : self.rank]
            self.ages[weight] = 0
            self.num_refreshes += 1
        self.due = set()
        projected = {}
        for weight in self.projected:
            tall = weight.shape[0] >= weight.shape[1]
            projected[weight] = weight.grad @ self.bases[weight] if tall else self.bases[weight].T @ weight.grad
            unit = projected[weight] / projected[weight].norm()
            self.ages[weight] += 1
            if self.ages[weight] == 1:
                self.first[weight] = unit
            elif self.ages[weight] % self.interval == 0:
                if (unit - self.first[weight]).norm() / self.ages[weight] < self.threshold:
                    self.due.add(weight)
        return projected


class PlainFira(PlainGaLore):
    """GaLore with the scaled residual (arXiv:2410.01623): what the basis misses is scaled and its growth limited."""

    num_limited = 0

    @torch.no_grad()
    def step(self) -> None:
        """One update of everything; gradients are cleared."""
        projected = self.projected_gradients()
        self.num_updates += 1
        self.norms = getattr(self, "norms", {})
        for weight in [*self.projected, *self.full]:
            grad = projected.get(weight, weight.grad)
            normalized = self._adam(weight, grad)
            if weight not in projected:
                weight.sub_(self.lr * normalized)
                weight.grad = None
                continue
            basis, tall = self.bases[weight], weight.shape[0] >= weight.shape[1]
            inside = grad @ basis.T if tall else basis @ grad
            phi = normalized.norm(dim=int(tall), keepdim=True) / grad.norm(dim=int(tall), keepdim=True)
            residual = phi * (weight.grad - inside)
            norm = residual.norm()
            if weight in self.norms and norm > 1.01 * self.norms[weight]:
                residual = residual * 1.01 * self.norms[weight] / norm
                self.num_limited += 1
            self.norms[weight] = residual.norm()
            update = normalized @ basis.T if tall else basis @ normalized
            weight.sub_(self.lr * (self.scale * update + residual))
            weight.grad = None


class PlainNormalized:
    """GradNormLoRP written plainly: W formed anew in each step, gradients of M, I and J by autograd through it.

    Args:
        plain: the model as it was; its blocks' linear weights are read, never changed.
        compiled: whose factors are copied at the start, and by whose names they go.
        sides: "two" for U^T D V, "one" for the shorter side.
        Others as of ``PlainGaLore``.
    """

    def __init__(
        self,
        plain: nn.Module,
        compiled: nn.Module,
        *,
        rank: int,
        gap: int,
        scale: float,
        factor_scale: float,
        lr: float,
        sides: str,
        eps: float,
    ) -> None:
        self.model, self.rank, self.gap, self.scale, self.factor_scale = plain, rank, gap, scale, factor_scale
        self.lr, self.sides, self.eps, self.num_updates = lr, sides, eps, 0
        given = {name: p for name, p in compiled.named_parameters() if p.requires_grad}
        self.parameters = {name: p.detach().clone().requires_grad_() for name, p in given.items()}
        self.layers = [name.removesuffix(".magnitude") for name in given if name.endswith(".magnitude")]
        self.bases: dict[str, tuple[Tensor, Tensor]] = {}
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}

    def loss(self, ids: Tensor) -> Tensor:
        """Of the model whose weights follow from the parameters."""
        values = {name: p for name, p in self.parameters.items() if not name.endswith(("magnitude", "_in", "_out"))}
        for name in self.layers:
            base = self.model.get_parameter(f"{name}.weight").detach()
            own = {part: self.parameters[f"{name}.{part}"] for part in ("magnitude", "factor_out", "factor_in")}
            direction = base + self.factor_scale * own["factor_out"] @ own["factor_in"]
            values[f"{name}.weight"] = own["magnitude"][:, None] * direction / direction.norm(dim=1, keepdim=True)
        return torch.func.functional_call(self.model, values, kwargs={"input_ids": ids, "labels": ids}).loss

    def step(self, ids: Tensor) -> None:
        """One update of everything."""
        grads = torch.autograd.grad(self.loss(ids), list(self.parameters.values()))
        self.num_updates += 1
        with torch.no_grad():
            for (name, parameter), grad in zip(self.parameters.items(), grads, strict=True):
                if not name.endswith(("factor_in", "factor_out")):
                    parameter.sub_(self.lr * self._adam(name, grad))
                    continue
                if self.num_updates == 2 or (self.num_updates - 1) % self.gap == 0:
                    left, _, right = torch.linalg.svd(grad, full_matrices=False)
                    self.bases[name] = left[:, : self.rank], right[: self.rank].T
                left, right = self.bases[name]
                if self.sides == "two":
                    update = left @ self._adam(name, left.T @ grad @ right) @ right.T
                elif grad.shape[0] >= grad.shape[1]:
                    update = self._adam(name, grad @ right) @ right.T
                else:
                    update = left @ self._adam(name, left.T @ grad)
                parameter.sub_(self.lr * self.scale * update)

    def _adam(self, name: str, grad: Tensor) -> Tensor:
        first, second = self.moments.get(name, (torch.zeros_like(grad), torch.zeros_like(grad)))
        first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad * grad
        self.moments[name] = (first, second)
        corrected = first / (1 - 0.9**self.num_updates)
        return corrected / ((second / (1 - 0.999**self.num_updates)).sqrt() + self.eps)
