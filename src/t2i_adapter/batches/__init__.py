"""Batches: which sample, caption, timestep and noise each draw of a run takes, and how the draws form batches."""
