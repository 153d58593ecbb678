"""The fast path on the device: packed rows, attention, the LM head, decoding. Imports nothing of ours.

Open packing.py first; for decoding grid.py, then decode.py. Each piece equals a slow and obvious twin in
tests/.
"""
