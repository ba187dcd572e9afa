"""What a person reads: reports of runs and of ablations, the diagnosis."""
