"""Datasets: the layouts on disk, on servers and on the hub, generated pictures, and the crop of a pair."""
