"""Damaged inputs for every loader: made from a number, loaded in a worker process, and judged.

    cd tests && python -m fuzz --loader parquet --num 10000      # a table, exit code 1 where something was found
    cd tests && python -m fuzz --loader parquet --only 1234      # one of them again, with its traceback

What may come out of a loader is a result or a DigitError of one line. Anything else is a finding: another exception, an
ended process, more than CPU_SECONDS for one input, or more than MEMORY_BYTES of resident memory.
"""
