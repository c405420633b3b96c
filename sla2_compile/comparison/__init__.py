"""Quality against time for every method, on a user's own model: `compare`.

| file | what |
|---|---|
| `run.py` | `compare`: each method in the model for a while, its output and its time |
| `result.py` | `Comparison`: the rows, as a table, as plain data |
| `plot.py` | the rows as a picture |
"""
