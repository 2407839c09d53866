"""Texts and calibration samples, and the data sets that they come from."""
