"""Each scenario of the acceptance list has a test that is named after it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

IDENTITY = (
    "replace_param", "replace_module", "module_moved", "replace_between_backward_and_step", "replace_then_unscale",
    "two_models_same_names", "add_group_bare", "assign_true", "overwrite_on_conversion", "swap_on_conversion",
    "swap_tensors", "data_assign", "data_assign_other_shape", "dtype_move_after_step", "deepcopy_pair",
    "weight_norm_after_init", "parametrize", "prune", "untie", "tied", "overlap", "expand",
    "swap_in_group_then_state_dict", "reorder_load", "shape_mismatch_load", "positional_load", "extra_layer_load",
    "missing_layer_load", "bf16_params_fp32_state_load", "in_process_alias", "orphan_growth", "fork_and_threads",
    "wrap",
)  # fmt: skip
"""A parameter in another object, place, dtype, process or file."""

ROWS = (
    "append_rows_step", "zero_moments_keep_step", "step_rows", "edited_rows", "rows_of_any_dimension", "resize",
    "a_failure_at_any_stage", "frozen_rows", "unfrozen_rows",
)  # fmt: skip
"""Gaussian splatting, growing vocabularies, pruning, resampled neurons."""

VALUES = (
    "clip", "two_steps_of_a_real_trainer", "the_binding_case", "clip_without_bounds", "a_box_may_have_one_side_only",
    "kept_momentum_holds_a_value_at_its_bound", "how_many_values_are_at_their_bound", "min_above_max", "nan_bound",
    "bound_that_does_not_broadcast", "declared_constraints_hold", "freeze_with_zero_grad", "freeze_with_stale_grad",
    "frozen_gradients_are_not_in_the_norm", "unfreezing_resumes_exactly",
)  # fmt: skip
"""Clipped, constrained and frozen."""

SCENARIOS = (*IDENTITY, *ROWS, *VALUES)


def collected_tests() -> list[str]:
    """The functions that pytest collects from the files beside this one."""
    return [
        node.name
        for file in Path(__file__).parent.rglob("test_*.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


def scenario_of(test: str) -> str | None:
    """The scenario that a test is named after: the longest that its name begins with."""
    fitting = [scenario for scenario in SCENARIOS if test.startswith(f"test_{scenario}")]
    return max(fitting, key=len, default=None)


@pytest.fixture(scope="module")
def tested() -> set[str | None]:
    return {scenario_of(test) for test in collected_tests()}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_scenario_has_a_test_of_its_name(scenario: str, tested: set[str | None]) -> None:
    assert scenario in tested


def test_a_longer_name_is_no_test_of_a_shorter_scenario() -> None:
    assert scenario_of("test_data_assign_other_shape_in_a_group") == "data_assign_other_shape"
    assert scenario_of("test_data_assign") == "data_assign"
    assert scenario_of("test_something_else") is None
