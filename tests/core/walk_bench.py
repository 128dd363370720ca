"""A walk over torch tensors without an optimizer around it, and torch's own Adam beside it."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from paramstate import _core

_core.connect(Tensor, nn.Parameter, Tensor.__dlpack_c_exchange_api__)  # type: ignore[attr-defined]

KEYS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class Bench:
    """A walk over one group of parameters, with a torch optimizer beside it that takes the same steps."""

    def __init__(self, *params: Tensor, amsgrad: bool = False, **settings: Any) -> None:
        self.params = list(params)
        self.settings = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01, **settings}
        self.amsgrad = amsgrad
        self.store = _core.Store()
        self.ids = [self.store.register(f"p{index}") for index in range(len(params))]
        self.walk = _core.Walk(self.store)
        self.walk.enroll([self.params], [self.ids])
        self.state: dict[Any, dict[str, Any]] = defaultdict(dict)
        for param in self.params:
            self.state[param] = self.fresh(param)

    def fresh(self, param: Tensor) -> dict[str, Any]:
        keys = KEYS if self.amsgrad else KEYS[:2]
        return {"step": torch.zeros(()), **{key: torch.zeros_like(param.detach()) for key in keys}}

    def step(self, **more: Any) -> _core.Outcome:
        s = self.settings
        setting = (s["lr"], *s["betas"], s["eps"], s["weight_decay"], False, self.amsgrad, False)
        keywords = {"threads": 2, "max_grad_norm": None, "grad_scale": None, "elsewhere_squares": None, **more}
        return self.walk.step([self.params], self.state, [setting], **keywords)

    def snapshot(self) -> list[Tensor]:
        tensors = [tensor for inner in self.state.values() if isinstance(inner, dict) for tensor in inner.values()]
        host = [t for t in (*self.params, *tensors) if type(t) in {Tensor, nn.Parameter} and t.layout == torch.strided]
        return [t.detach().clone() for t in host if t.device.type == "cpu"]


def param(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    made = nn.Parameter(torch.randn(shape, dtype=dtype))
    made.grad = torch.randn(shape, dtype=dtype)
    return made


def twin(bench: Bench) -> torch.optim.Adam:
    """torch's own Adam over copies, in the same state."""
    copies = []
    for p in bench.params:
        copy = nn.Parameter(p.detach().clone())
        copy.grad = None if p.grad is None else p.grad.clone()
        copies.append(copy)
    return torch.optim.Adam(copies, amsgrad=bench.amsgrad, **bench.settings)


def follows(bench: Bench, other: torch.optim.Adam) -> None:
    other.step()
    for ours, theirs in zip(bench.params, other.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def unchanged(bench: Bench, before: list[Tensor]) -> None:
    for now, then in zip(bench.snapshot(), before, strict=True):
        assert torch.equal(now, then)


def conjugated(*shape: int) -> Tensor:
    """A tensor whose memory means its negation."""
    negated = torch.randn(shape, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    return negated
