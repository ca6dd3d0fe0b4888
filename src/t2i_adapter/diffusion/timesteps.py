"""From a uniform number to a timestep."""

from __future__ import annotations

from collections.abc import Callable


def cubic(u: float, num_timesteps: int) -> int:
    """t = (1 - u^3) T, paper 2302.08453 section 3.4: two thirds of the draws have t >= 0.7 T."""
    return min(int((1.0 - u**3) * num_timesteps), num_timesteps - 1)


def uniform(u: float, num_timesteps: int) -> int:
    """Every timestep alike."""
    return min(int(u * num_timesteps), num_timesteps - 1)


SAMPLERS: dict[str, Callable[[float, int], int]] = {"cubic": cubic, "uniform": uniform}


def sample(name: str, u: float, num_timesteps: int) -> int:
    """The timestep in [0, num_timesteps) that sampler `name` makes of `u` in [0, 1)."""
    return SAMPLERS[name](u, num_timesteps)
