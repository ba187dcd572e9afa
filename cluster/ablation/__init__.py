"""Arms by seeds: the plan, the cells as runs of their own, the statistics."""
