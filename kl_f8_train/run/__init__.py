"""How does a run live? Training, saving, logs, validation, status."""
