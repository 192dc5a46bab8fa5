"""Is it better? Evaluation, comparison, report."""
