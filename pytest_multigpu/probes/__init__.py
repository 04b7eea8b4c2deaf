"""Linear probes: file formats and scoring. Imports records, units and errors only."""
