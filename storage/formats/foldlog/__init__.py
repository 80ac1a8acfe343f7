"""foldlog's own format: frames, as `protocol/frames.py` lays them out.

codec.py   encodes what a writer appends
writer.py  writes a fold to a new file
replay.py  builds the fold from a file
walk.py    reads all of a damaged file, piece by piece
check.py   checks every invariant of a file
log.py     the format behind the seam `formats/format.py`
"""
