"""Export to ONNX: one node `sla2::attention` for each site, with a body that stock onnxruntime runs.

| place | one idea |
|---|---|
| `onnx.py` | `export_onnx`: from a model to a file, step by step |
| `program.py` | the ExportedProgram of a model, in which each site's call is one op |
| `arguments.py`, `state.py` | what a model may take and return, and what it writes into |
| `calls.py`, `remaining.py` | calls that a program lost, which is an error, and those that stay full attention |
| `node.py`, `config.py` | the node, its schema, and the constants that its body is built for |
| `body/` | the body in standard operators |
| `attach.py` | bodies for the nodes of a model, kept as functions or written inline |
| `written.py` | a file that is there whole or not at all |
| `verify.py` | `verify_onnx`: the file against the model |
| `runs.py`, `session.py`, `compared.py` | its inputs, also at another batch and length; its file; its errors |
| `imitation.py` | the model in the format of a file, in PyTorch |
"""
