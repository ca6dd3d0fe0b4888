"""Number of examples of the property tests: seconds in `make test`, hours in `make soak` (HYPOTHESIS_PROFILE=soak)."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

NO_HEALTH_CHECKS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]

# Derandomised: each run has the same examples, so that no test fails at random.
# Without the shrink phase, which takes minutes.
settings.register_profile(
    "short",
    max_examples=40,
    deadline=20_000,
    derandomize=True,
    database=None,
    suppress_health_check=NO_HEALTH_CHECKS,
    phases=(Phase.explicit, Phase.generate),
)
settings.register_profile(
    "soak", max_examples=5_000, deadline=20_000, database=None, suppress_health_check=NO_HEALTH_CHECKS
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))
