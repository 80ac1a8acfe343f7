"""The fold: one immutable state, made of a base in the log and the changes since.

snapshot.py   base + delta + runs: one immutable state
reading.py    what any engine's snapshot offers to readers, and to writers of files
delta.py      changes newer than the base: runs, and the delta they settle into
base.py       the leaves of a log, read on demand
cache.py      what was read from the base, within a bound
leaf.py       the entries of the base, 128 to 512 per frame
diff.py       the difference between two folds, at the cost of what changed
collector.py  holding back full garbage collections during large builds
"""
