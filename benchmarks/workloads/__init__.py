"""What is measured: one file per bench. A new one needs `REPETITIONS` and `run`, nothing else."""
