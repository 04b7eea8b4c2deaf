"""For this repository's own tests: pytester, and the plugin where it is not installed."""

pytest_plugins = ["pytester"]
