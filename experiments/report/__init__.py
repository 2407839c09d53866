"""Tables, figures and one HTML page from the records of many runs: python -m experiments.report FOLDER... [--out DIR].

It reads record.json, layers.jsonl and run.log, and nothing of the package: it runs where torch is not installed.
"""
