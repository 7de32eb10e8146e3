"""fp32 masters of half-precision weights: updates smaller than a rounding step of bf16 would be lost."""

import torch
from torch import Tensor

FP16_SCALE = 4096.0  # of the loss, so that small fp16 gradients do not vanish; less after an overflow
CALM = 100  # updates without one, after which it may rise again


class Masters:
    """What an optimiser steps: the weights themselves where they are fp32, else fp32 copies (`tensors`).
    Frozen ones (`--lora`) it does not see.

    Gradients of half-precision weights move to their copies as soon as each is complete, micro-batch by
    micro-batch, so that they add up in fp32. Multiply a loss by `scale` before its backward pass; `publish`
    after a step writes the copies into the weights, in place.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.half = any(weight.dtype != torch.float32 for weight in self.weights)
        self.scaled = any(weight.dtype == torch.float16 for weight in self.weights)
        self.scale = FP16_SCALE if self.scaled else 1.0
        self.calm = 0
        self.tensors: list[Tensor] = self.weights
        if self.half:
            self.tensors = [weight.detach().float().requires_grad_() for weight in self.weights]
            of = dict(zip(self.weights, self.tensors, strict=True))

            def take(weight: Tensor) -> None:
                of[weight].grad.add_(weight.grad, alpha=1 / self.scale)
                weight.grad = None

            self.hooks = [weight.register_post_accumulate_grad_hook(take) for weight in self.weights]
        self.zero_gradients()

    def zero_gradients(self) -> None:
        """Zeros, not None: as published, an update without any contrast still decays Adam's momentum."""
        for tensor in self.tensors:
            tensor.grad = torch.zeros_like(tensor)

    @torch.no_grad()
    def publish(self) -> None:
        """After a step: write the masters into the weights."""
        if self.half:
            torch._foreach_copy_(self.weights, self.tensors)
        self.calm += 1
        if self.scaled and self.calm >= CALM and self.scale < FP16_SCALE:
            self.scale, self.calm = self.scale * 2, 0

    def lower_scale(self) -> bool:
        """After an overflow: scale the next losses less, if that is still possible: whether it was."""
        possible = self.scale > 1
        self.scale = max(1.0, self.scale / 16)
        self.calm = 0
        return possible

    def state(self) -> dict:
        """What a checkpoint keeps beside the weights; nothing if they are their own masters."""
        return {"tensors": self.tensors, "scale": self.scale, "calm": self.calm} if self.half else {}

    @torch.no_grad()
    def load(self, state: dict) -> None:
        """Put a `state` back, after the weights. It may be that of a run in another dtype."""
        if self.half:
            there = [x.to(self.tensors[0].device) for x in state["tensors"]] if state else self.weights
            torch._foreach_copy_(self.tensors, there)
        elif state:
            torch._foreach_copy_(self.weights, [x.to(self.weights[0].device) for x in state["tensors"]])
        if self.scaled and state:
            self.scale = max(1.0, state["scale"])
            self.calm = state["calm"]
