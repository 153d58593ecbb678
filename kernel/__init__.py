"""The fast path on the device: packed rows, their attention, the LM head, and decoding. Imports nothing of
ours.

Open packing.py first. Each piece equals a slow and obvious twin in tests/.
"""
