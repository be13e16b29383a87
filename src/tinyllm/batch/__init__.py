"""Many prompts from a file or a table: rows in, rows out, none lost.

Invariant: a row's answer depends on the model, the settings and the row alone: its seed is made of its key,
so neither the other rows, nor their order, nor a second try changes a bit. What is wrong with a row is said
in its own result and ends nobody else's. rows.py answers rows, openai.py those of OpenAI's batch format,
jobs.py reads and resumes files. Imports `tinyllm`, and `server` for OpenAI's rows alone. ray/ stands on it.
"""

from tinyllm.batch.jobs import Job, Totals, run_file
from tinyllm.batch.rows import Rows, row_seed

__all__ = ["Job", "Rows", "Totals", "row_seed", "run_file"]
