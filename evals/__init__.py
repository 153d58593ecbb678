"""BFCL, API-Bank, ACEBench: their data, their verdicts, the replies to judge, reports. Open report.py first.

Imported by eval_bfcl.py, eval_apibank.py, session.py, and by the corpus for its overlap with the benchmarks.
"""
