"""Audit of a data set: wrong labels, copies, leakage between parts, outliers and broken images."""
