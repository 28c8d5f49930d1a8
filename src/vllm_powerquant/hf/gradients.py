"""What is read from a packed cache has no gradient; without this it would be taken for a constant, without a word."""

from __future__ import annotations

import torch

from ..errors import PowerQuantUnsupportedError


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, result: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> None:
        raise PowerQuantUnsupportedError(
            "a packed cache has no gradients; train and take gradients with use_cache=False, or with a DynamicCache"
        )


@torch.compiler.disable
def refuse_gradients(result: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
    """result, computed from sources without gradients: backward() through it raises PowerQuantUnsupportedError."""
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in sources):
        return result
    return _Refused.apply(result, *sources)
