"""Measures of what an adapter does: metrics, controls, report."""
