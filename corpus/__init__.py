"""Training records: layouts, filters, conversions, and the demo's generated data. Open examples.py first.

Imported by data.py, which reads files by it, and by whoever handles an Example.
"""
