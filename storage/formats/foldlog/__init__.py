"""foldlog's own format: frames, as `protocol/frames.py` lays them out.

codec.py   what a writer appends
writer.py  a fold as a new file
replay.py  a file into a fold
walk.py    all of a damaged file, piece by piece
check.py   every invariant of a file
log.py     the format on the seam
"""
