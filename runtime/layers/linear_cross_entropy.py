"""Cross-entropy of a linear layer, computed in chunks of tokens so that the full logits never exist.

    tokens of a chunk ──> logits ──> loss, softmax - one_hot (in place) ──> dX of the chunk, added to dW
                          one buffer of (chunk, V), reused                   all in the forward; the backward scales

The gradients are computed while a chunk's logits are still in the cache, as in Liger-Kernel's fused linear
cross-entropy (Hsu et al. 2024, arXiv:2410.10989, section 3.2). For 4 x 256 tokens and V = 32,000 in float32 the eager
chain holds three tensors of 125 MiB at once. This function holds one of 32 MiB and dW, which the backward needs anyway.

Known weakness: dW lives from the forward on, together with the saved activations.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from galore_fx.errors import UsageError
from galore_fx.runtime.uniform_loop import alike

# Bytes of a chunk's float32 logits: large enough for efficient products, small enough for the cache.
CHUNK_BYTES = 32 * 2**20
# Elements of dW per product when it is accumulated in float32.
PRODUCT_ELEMENTS = 2**22


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, reduction: str
) -> Tensor:
    """Computes ``F.cross_entropy(F.linear(hidden, weight, bias).float(), target, ...)`` without the full logits.

    Args:
        hidden: X, (..., h).
        weight: W, (V, h).
        bias: (V,) or None.
        target: class indices, one per row of X, int64.
        ignore_index: target value without effect on loss and gradients.
        reduction: "mean" over the targets that are not ignored, or "sum".

    Returns:
        The loss, 0-d float32. A second backward through it raises UsageError.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    loss: Tensor = _LinearCrossEntropy.apply(rows, weight, bias, target.reshape(-1), ignore_index, reduction)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        ignore_index: int,
        reduction: str,
    ) -> Tensor:
        num_tokens, vocabulary = hidden.shape[0], weight.shape[0]
        counts = target != ignore_index
        factor, num_counting = counts.float(), counts.sum()
        if reduction == "mean":
            factor /= num_counting.clamp_min(1)
        safe_target = torch.where(counts, target, 0)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        size = max(1, min(num_tokens, CHUNK_BYTES // (4 * vocabulary)))
        sums = _GradientSums(ctx.needs_input_grad, hidden, weight, bias, single=size == num_tokens)
        for start in alike(range(0, num_tokens, size)):
            part = slice(start, min(start + size, num_tokens))
            logits = torch.nn.functional.linear(hidden[part], weight, bias).float()
            # All in place: torch.logsumexp would hold a second tensor of this size and compute the exponentials twice.
            logits -= logits.amax(1, keepdim=True)
            picked = logits.gather(1, safe_target[part, None])
            normaliser = logits.exp_().sum(1, keepdim=True)
            loss += ((normaliser.log() - picked)[:, 0] * factor[part]).sum()
            if sums.wanted:
                logits.mul_(factor[part, None] / normaliser)
                logits.scatter_add_(1, safe_target[part, None], -factor[part, None])
                sums.add(part, logits.to(hidden.dtype), hidden[part], weight)
        ctx.gradients = sums.finished()
        # As in torch, the mean over no targets is NaN, with zero gradients.
        return loss * (num_counting / num_counting) if reduction == "mean" else loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        if ctx.gradients is None:
            raise UsageError(
                "a second backward through the same loss: its gradients were made in the forward and have been used. "
                "Compile with keep_logits=True to keep the graph"
            )
        gradients, ctx.gradients = ctx.gradients, None
        # Reading the factor is free on a CPU; it is 1 unless micro-batches are averaged or the loss is scaled.
        if grad_output.device.type != "cpu" or grad_output.item() != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad_output)
        return (*gradients, None, None, None)


class _GradientSums:
    """Gradients of X, W and b, filled chunk by chunk; the sums for b, and for W over several chunks, are float32."""

    def __init__(
        self, needs: tuple[bool, ...], hidden: Tensor, weight: Tensor, bias: Tensor | None, *, single: bool
    ) -> None:
        self.wanted = any(needs[:3])
        self.dtype = weight.dtype
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        make = torch.empty_like if hidden.shape[0] else torch.zeros_like
        self.weight = make(weight, dtype=weight.dtype if single else torch.float32) if needs[1] else None
        self.bias = torch.zeros_like(bias, dtype=torch.float32) if needs[2] and bias is not None else None

    def add(self, part: slice, grad_logits: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Adds one chunk, from the gradient of its logits (c, V), its X (c, h) and W (V, h)."""
        if self.hidden is not None:
            torch.mm(grad_logits, weight.to(grad_logits.dtype), out=self.hidden[part])
        if self.weight is not None:
            beta = 0.0 if part.start == 0 else 1.0  # beta 0 overwrites: the buffer starts uninitialised
            if self.weight.dtype is grad_logits.dtype:
                self.weight.addmm_(grad_logits.T, hidden, beta=beta)
            else:
                self._add_in_float32(self.weight, grad_logits, hidden, overwrite=not beta)
        if self.bias is not None:
            self.bias += grad_logits.sum(0, dtype=torch.float32)

    @staticmethod
    def _add_in_float32(weight: Tensor, grad_logits: Tensor, hidden: Tensor, *, overwrite: bool) -> None:
        """Adds the product a few rows at a time; the whole would be as large as dW, and often the peak of a step."""
        size = max(1, PRODUCT_ELEMENTS // weight.shape[1])
        for start in alike(range(0, weight.shape[0], size)):
            rows, product = weight[start : start + size], grad_logits[:, start : start + size].T @ hidden
            rows.copy_(product) if overwrite else rows.add_(product)

    def finished(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns the gradients of X, W and b in the dtypes of X and W; None where no gradient is needed."""
        weight, bias = (None if sum_ is None else sum_.to(self.dtype) for sum_ in (self.weight, self.bias))
        return self.hidden, weight, bias
