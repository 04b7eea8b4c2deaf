"""Probes on the residual stream: files, scores, and whether a probe fits a model.

Imports records, units and errors. torch and numpy are imported inside functions.
"""
