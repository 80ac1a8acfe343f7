"""What inspects and repairs logs, valid or damaged.

verify.py   every invariant, in code
walk.py     all of a damaged log, piece by piece
salvage.py  what is valid in a damaged log, as a new one
"""
