"""The run folder, both ends: what a run writes down and how it is read back."""
