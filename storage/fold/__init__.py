"""The fold: one immutable state, made of a base that lies in the log and of the changes since.

snapshot.py   base + delta + runs: one immutable state
delta.py      changes newer than the base: runs, and the delta that they settle into
base.py       the leaves of a log, read when they are touched
leaf.py       the entries of the base, 128 to 512 to a frame
diff.py       the difference of two folds, at the cost of what changed
collector.py  the garbage collector, held back while much is built
"""
