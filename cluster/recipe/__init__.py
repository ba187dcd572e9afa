"""From TOML to a checked plan: sections, problems, placement, what is asked before a start."""
