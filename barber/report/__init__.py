"""Tables, figures and one HTML page from the records of many runs: barber report FOLDER... [--out DIR].

It reads the folders of runs (record.json, layers.jsonl, run.log) and tables of records (`sources`), and runs where
torch is not installed.
"""
