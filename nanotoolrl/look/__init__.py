"""Looking at models and runs: evaluation, doctor, report, study, and what a run leaves on disk."""
