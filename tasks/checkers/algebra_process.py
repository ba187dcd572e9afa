"""The process in which math-verify compares; run by its path, imported by nobody.

math-verify interrupts itself by SIGALRM, which only a main thread can, and arithmetic on huge
numbers cannot be interrupted at all. So a line of JSON is read, `[[gold, said], ...]`, and one
written, `[true, ...]`. A fork of this process does the work: when it takes more than the seconds
of the processor that the command line gives (not of the clock: a verdict must not depend on load),
the system ends it, its exit code is written, and the next fork comes at once, since the libraries
are loaded. When the process that asks is gone, reading ends, and so does this: no orphan is left.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys

MEMORY = 2 << 30
"""Bytes of addresses; what needs more is wrong."""


def serve(seconds: float) -> None:
    """Answer lines until there are none. SIGPROF, left to the system, ends it at the deadline."""
    for line in iter(sys.stdin.buffer.readline, b""):
        pairs = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        verdicts = [equivalent(gold, answer) for gold, answer in pairs]
        signal.setitimer(signal.ITIMER_PROF, 0)
        say(verdicts)


def equivalent(gold: str, answer: str) -> bool:
    """Whether both are the same mathematics; each is read whole, never searched for some."""
    try:
        expressions = [
            parse(f"${text}$", [LATEX], fallback_mode="no_fallback", parsing_timeout=0)
            for text in (gold, answer)
        ]
        return all(expressions) and verify(
            expressions[0][:1], expressions[1][:1], allow_set_relation_comp=True, timeout_seconds=0
        )
    except Exception:
        return False


def say(word: list[bool] | int) -> None:
    """One line; an end where nobody reads it."""
    try:
        os.write(1, json.dumps(word).encode() + b"\n")
    except BrokenPipeError:
        os._exit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for whom asks, who then closes the pipe
    logging.disable(logging.CRITICAL)
    from math_verify import LatexExtractionConfig, parse, verify

    LATEX = LatexExtractionConfig(boxed_match_priority=-1)
    for gold, said in (("x^2+2x+1", "(x+1)^2"), ("y=2x", "y-2x=0"), (r"(1,\infty)", "x>1")):
        equivalent(gold, said)  # what is loaded and remembered at the first use
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    say([])  # ready
    while fork := os.fork():
        if not (code := os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])):
            sys.exit()
        say(code)
    serve(float(sys.argv[1]))
    os._exit(0)
