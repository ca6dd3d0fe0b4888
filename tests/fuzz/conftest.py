"""How long the property tests look: seconds in `make test`, long in `make soak` (HYPOTHESIS_PROFILE=soak)."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

CALM = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]

# The same examples each time: a test that fails now and then holds nothing up but people.
# What fails is shown as it was found: making it smaller takes minutes.
settings.register_profile(
    "short",
    max_examples=40,
    deadline=20_000,
    derandomize=True,
    database=None,
    suppress_health_check=CALM,
    phases=(Phase.explicit, Phase.generate),
)
settings.register_profile("soak", max_examples=5_000, deadline=20_000, database=None, suppress_health_check=CALM)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))
