"""READY or NOT READY: is this multi-GPU machine fit for this large model?

The pytest plugin is :mod:`pytest_multigpu.plugin`. Nothing heavy is imported here.
"""

__version__ = "0.1.0"
