"""What a user meets: recipes, the command line, placement, the driver, evaluation."""

import os

# Nothing here reports usage to anyone, and so neither do the engines it starts.
for _switch, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}.items():
    os.environ.setdefault(_switch, _value)
