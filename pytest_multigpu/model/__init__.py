"""Adapters to the model: describing, synthesising, loading, generating, metering."""
