"""Damaged inputs for every loader: generated from a number, loaded in a worker process, and judged.

    cd tests && python -m fuzz --loader parquet --num 10000      # a table; exit code 1 if there are findings
    cd tests && python -m fuzz --loader parquet --only 1234      # one input again, with its traceback

A loader may return a result or raise a DigitError of one line. Anything else is a finding: another exception, an ended
process, more than CPU_SECONDS for one input, or more than MEMORY_BYTES of resident memory.
"""
