"""The format "slipstream-v2": the log of the Rust crate `beyond-slipstream`.

records.py  the bytes of a record
search.py   finds whole records in damaged bytes
judge.py    where the base ends, and torn or corrupt
walk.py     reads all of a damaged file, and reports what is wrong with it
log.py      the format behind the seam `formats/format.py`
"""
