"""The file formats: foldlog's own frames, and the records of the Rust crate.

format.py    the seam: what a log needs of its format
registry.py  the one table of formats, and reading a log of whichever it is
rewrite.py   a fold into a new file: creation, compaction, export
foldlog/     foldlog's own format
slipstream/  the format of the Rust crate
"""
