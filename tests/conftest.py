"""Settings that every test shares: how hypothesis runs, and torch left as it was found."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite(
    "client_writes", "fsrs", "identity_machine", "reference", "same_training", "small_models"
)

settings.register_profile(
    "paramstate",
    deadline=None,  # the first example pays for building thread pools and importing torch's lazy parts
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
settings.load_profile("paramstate")


@pytest.fixture(autouse=True)
def torch_is_left_as_it_was() -> Iterator[None]:
    """A test that changes the thread count, the default dtype or the seed changes it for itself only."""
    threads, dtype, rng = torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_rng_state(rng)
