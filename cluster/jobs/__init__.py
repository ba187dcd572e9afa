"""Jobs of a Ray cluster: what travels with one, how it is asked for, and the head that runs it."""
