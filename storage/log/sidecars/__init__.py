"""The small files beside a log, and what they tell of it.

lock.py        one writer per log, and the note beside it
note.py        the bytes of the note
regression.py  whether a log ends before what was synced to it
origins.py     the upstream's identity, for formats that have no field for it
"""
