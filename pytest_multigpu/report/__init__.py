"""Records to text: terminal, JSON, HTML, GitHub. Imports records, units and errors only."""
