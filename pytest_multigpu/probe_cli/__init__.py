"""``python -m pytest_multigpu.probes``: convert probe files, score transcripts.

Here the probes meet the plan, the loader and the judges. Knows the session, and no more of pytest.
"""
