"""Many processes, one result: ranks, sharded weights, shares of a batch, checkpoints.

Imported by rollout.py, session.py and what stands above them. Open ranks.py first.
"""
