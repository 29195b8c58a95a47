"""Measuring mixtures: whether an answer has both what one state knows and how another speaks."""
