"""The shipped checks. Run them anywhere: ``pytest --pyargs pytest_multigpu.checks``."""
