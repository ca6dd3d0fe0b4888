"""Conditions: made from the image by a named annotator, or cut with it by the same map."""
