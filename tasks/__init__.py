"""Problems, images, prompts, parsers, checkers, solvers and data sets; pure, no torch, no Ray."""
