"""The NumPy `Store` and the torch optimizer do the same to rows, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from paramstate import AdamW, MaxNorm, Store

SETTINGS: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1}


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_rows_of_a_store_and_of_an_optimizer_have_the_same_bits(dim: int, max_grad_norm: float | None) -> None:
    rng = np.random.default_rng(dim)
    start = rng.standard_normal((5, 5)).astype("float32")
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.from_numpy(start.copy()))
    opt = AdamW(module, max_grad_norm=max_grad_norm, **SETTINGS)
    store = Store()
    store.register("weight", start)

    def step(rows: Any = None) -> None:
        grad = rng.standard_normal(store.value("weight").shape).astype("float32")
        module.weight.grad = torch.from_numpy(grad.copy())
        named = None if rows is None else {"weight": rows}
        opt.step(rows=named)
        store.step({"weight": grad}, decoupled_weight_decay=True, max_grad_norm=max_grad_norm, rows=named, **SETTINGS)
        assert np.array_equal(store.value("weight"), module.weight.detach().numpy())
        state = store.state("weight")
        for key in ("exp_avg", "exp_avg_sq"):
            assert np.array_equal(state[key], opt.state[module.weight][key].numpy())
        steps = store.row_steps("weight")
        expected = opt.row_steps("weight").tolist()
        assert expected == ([int(state["step"])] * len(expected) if steps is None else steps)

    step()
    opt.freeze_rows("weight", [1, -1], dim=dim)
    store.freeze_rows(["weight"], [1, -1], dim=dim)
    step()
    if dim == 0:
        step([0, 1, 2])
    with opt.edit_rows() as rows:
        rows.gather("weight", [4, 0, 1, 1, 3], dim=dim)
        rows.append("weight", copy_of=[0], state_of=[2], dim=dim)
        rows.reset("weight", [3], dim=dim)
        rows.pad("weight", 1, 1, value=0.5, dim=dim)
        rows.resize("weight", 7, dim=dim)
    store.gather_rows(["weight"], [4, 0, 1, 1, 3], dim=dim)
    store.append_rows(["weight"], copy_of=[0], state_of=[2], dim=dim)
    store.reset_rows(["weight"], [3], dim=dim)
    store.pad_rows(["weight"], 1, 1, value=0.5, dim=dim)
    store.resize_rows(["weight"], 7, dim=dim)
    step()
    opt.constrain("weight", MaxNorm(1.0, dim=1))
    store.set_max_norm("weight", 1.0, dim=1)
    step()
    opt.unfreeze_rows("weight", [1])
    store.unfreeze_rows(["weight"], [1])
    step()
    opt.unfreeze_rows("weight")
    store.unfreeze_rows(["weight"])
    step()
