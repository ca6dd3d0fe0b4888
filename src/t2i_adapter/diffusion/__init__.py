"""The mathematics of diffusion training: noise schedule, timestep sampling, objective. No models, no data."""
