"""Choices: which sample, caption, timestep and noise make each draw of a run, and the batches they form."""
