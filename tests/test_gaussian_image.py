"""The demonstration of rows, in short: Gaussians come and go while they are fitted, by hand and by `edit_rows`."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
HEIGHT, WIDTH = 24, 36


def imported(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def demonstration() -> ModuleType:
    return imported("gaussian_image")


@pytest.fixture(scope="module")
def photograph(demonstration: ModuleType) -> torch.Tensor:
    image: torch.Tensor = demonstration.load_photograph(HEIGHT, WIDTH)
    return image


@pytest.fixture(scope="module")
def schedule(demonstration: ModuleType) -> Any:
    return demonstration.Schedule(steps=400, first=40, last=120)


@pytest.fixture(scope="module")
def fits(demonstration: ModuleType, photograph: torch.Tensor, schedule: Any) -> list[Any]:
    """By hand, and by `edit_rows`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small an image is not worth sharing
    try:
        return [demonstration.fit(way, photograph, schedule, lambda: None) for way in demonstration.WAYS]
    finally:
        torch.set_num_threads(threads)


def test_both_fits_go_down(fits: list[Any]) -> None:
    for fit in fits:
        assert fit.losses[-1] < 0.01 * fit.losses[0]


def test_both_fits_have_as_many_gaussians_at_every_step(fits: list[Any]) -> None:
    by_hand, by_rows = fits
    assert by_hand.counts == by_rows.counts
    assert (by_rows.counts[0], by_rows.counts[-1]) == (40, 120)
    assert len(set(by_rows.counts)) == 7, "the first ones, and six times that rows came"


def test_state_has_the_shape_of_its_parameter_and_belongs_to_no_other(fits: list[Any]) -> None:
    for fit in fits:
        assert [group["params"][0] for group in fit.optimizer.param_groups] == list(fit.gaussians.values())
        assert len(fit.optimizer.state) == len(fit.gaussians)
        for param in fit.gaussians.values():
            assert len(param) == fit.counts[-1]
            for key in ("exp_avg", "exp_avg_sq"):
                assert fit.optimizer.state[param][key].shape == param.shape
        assert {len(values) for values in fit.side.values()} == {fit.counts[-1]}


def test_each_row_knows_how_many_steps_it_has_taken(fits: list[Any], schedule: Any) -> None:
    by_rows = fits[1]
    taken = schedule.steps - by_rows.side["born"].clamp(min=0)
    assert len(taken.unique()) > 3
    for name in by_rows.gaussians:
        assert torch.equal(by_rows.optimizer.row_steps(name), taken)


def test_new_rows_of_edit_rows_begin_with_a_step_of_lr_and_those_by_hand_move_more(fits: list[Any]) -> None:
    by_hand, by_rows = (fit.movement for fit in fits)
    assert by_rows.by_age[0] == pytest.approx(1.0, abs=0.05), "a value at its bound, or without a pull, moves less"
    assert by_rows.mean < 1.0
    assert by_hand.mean > 1.3 * by_rows.mean


def test_under_a_constant_gradient_a_new_row_moves_by_lr_or_by_hand_up_to_five_times_as_far(
    demonstration: ModuleType,
) -> None:
    by_hand, by_rows = (demonstration.movement_under_constant_gradient(way) for way in demonstration.WAYS)
    assert by_rows == pytest.approx([1.0] * 10, abs=1e-5)
    assert (by_hand[0], by_hand[-1]) == pytest.approx((2.515, 5.206), abs=1e-3)
    assert sum(by_hand) == pytest.approx(44.0, abs=0.1)


def test_bounds_hold_for_all_rows_at_the_end(demonstration: ModuleType, fits: list[Any]) -> None:
    for fit in fits:
        for name, (low, high) in demonstration.BOUNDS.items():
            values = fit.gaussians[name]
            assert bool(((values >= torch.tensor(low)) & (values <= torch.tensor(high))).all())


def test_both_ways_carry_out_the_same_plan(demonstration: ModuleType) -> None:
    results = []
    for way in demonstration.WAYS:
        params = nn.ParameterDict({"means": torch.arange(8.0).view(4, 2), "opacities": torch.full((4,), 0.5)})
        optimizer = way.optimizer(params, {"means": 0.1, "opacities": 0.1}, {"opacities": (0.0, 1.0)})
        for param in params.values():
            param.grad = torch.arange(1.0, param.numel() + 1).view_as(param)
        optimizer.step()
        new = {"means": torch.full((1, 2), 9.0), "opacities": torch.tensor([0.25])}
        side = {"count": torch.arange(4)}
        way.densify(demonstration.Plan(torch.tensor([True, False, True, True]), new, pruned=1), optimizer, params, side)
        state = [optimizer.state[param] for param in params.values()]
        results.append((dict(params), [(held["exp_avg"], held["exp_avg_sq"]) for held in state], side))
    torch.testing.assert_close(results[0], results[1])
    values, _, side = results[1]
    assert values["means"].flatten().tolist() == pytest.approx([-0.1, 0.9, 3.9, 4.9, 5.9, 6.9, 9.0, 9.0])
    assert side["count"].tolist() == [0, 2, 3, 0]


def test_the_picture_is_the_sum_of_the_gaussians() -> None:
    """Against the equation, evaluated at every pixel by matrices; small ones, so that nothing lies beyond a window."""
    gaussians = imported("gaussians")
    draw = torch.Generator().manual_seed(3)
    count = 20
    params = nn.ParameterDict(
        {
            "means": torch.rand(count, 2, generator=draw) * torch.tensor([WIDTH + 4.0, HEIGHT + 4.0]) - 2.0,
            "log_scales": torch.rand(count, 2, generator=draw) - 0.7,
            "rotations": torch.rand(count, generator=draw) * 6.0,
            "colours": torch.randn(count, 3, generator=draw),
            "opacities": torch.rand(count, generator=draw),
        }
    )
    y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    pixels = torch.stack([x, y], dim=2).double()
    expected = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.float64)
    for n in range(count):
        values = {name: param.detach()[n].double() for name, param in params.items()}
        angle = float(values["rotations"])
        turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]).double()
        covariance = turn @ torch.diag(torch.exp(2 * values["log_scales"])) @ turn.T
        d = pixels - values["means"]
        power = -0.5 * torch.einsum("hwi,ij,hwj->hw", d, torch.linalg.inv(covariance), d)
        expected += values["opacities"] * values["colours"][:, None, None] * power.exp()
    torch.testing.assert_close(gaussians.render(params, HEIGHT, WIDTH).double(), expected, rtol=1e-4, atol=1e-4)


def test_dividing_gaussians_keeps_the_picture_nearly_as_it_is(photograph: torch.Tensor) -> None:
    gaussians, densification = imported("gaussians"), imported("densification")
    before = gaussians.initial_gaussians(60, photograph, torch.Generator().manual_seed(1))
    side = densification.new_statistics(60)
    side["gradient"] += torch.arange(60.0)
    side["count"] += 1
    with torch.no_grad():
        before["log_scales"][:, 0] += 0.2
        before["colours"].copy_(0.3)
        before["opacities"][0] = 0.0
        before["rotations"] += 0.5
    chosen = densification.plan(before, side, 70)
    assert (chosen.pruned, chosen.added, int(chosen.keep.sum())) == (1, 22, 48)
    assert chosen.keep.nonzero().flatten().tolist() == list(range(1, 49)), "those that are pulled most are divided"
    after = nn.ParameterDict(
        {name: torch.cat([value[chosen.keep], chosen.new[name]]) for name, value in before.items()}
    )
    old, new = (gaussians.render(each, HEIGHT, WIDTH) for each in (before, after))
    assert (old - new).square().mean() < 1e-3 * old.square().mean()


def test_the_deepest_fall_is_that_after_rows_came(demonstration: ModuleType) -> None:
    class Curve:
        losses = (1.0, 0.1, 0.01, 0.1, 0.01, 0.02)
        counts = (4, 4, 4, 5, 5, 5)

    assert demonstration.deepest_fall(Curve) == pytest.approx(10.0)


def test_lines_of_code_are_counted_without_docstrings_and_comments(demonstration: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "surgery.py"
    source.write_text(
        '"""Module."""\nimport os\n\ndef f(\n    a,\n):\n    """Doc."""\n    # why\n    return (\n        a\n    )\n'
    )
    assert demonstration.lines_of_code(source) == 2
    by_hand, by_rows = (demonstration.lines_of_code(way.source) for way in demonstration.WAYS)
    assert by_hand > 3 * by_rows


def test_the_table_and_the_picture_show_both_fits(
    demonstration: ModuleType, photograph: torch.Tensor, fits: list[Any], tmp_path: Path
) -> None:
    named = {way.name: fit for way, fit in zip(demonstration.WAYS, fits, strict=True)}
    constant = {name: [1.0] * 10 for name in named}
    table = demonstration.table_of(named, constant)
    assert [len(list(column.cells)) for column in table.columns] == [11, 11, 11]
    picture = tmp_path / "fits.png"
    demonstration.draw_fits(photograph, named, constant, 50, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
