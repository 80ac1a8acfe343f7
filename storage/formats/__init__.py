"""The file formats: foldlog's own frames, and the records of the Rust crate.

format.py    the seam: what a log needs from its format
registry.py  the one table of formats, and loading a log of any format
rewrite.py   a fold into a new file: creation and compaction
foldlog/     foldlog's own format
slipstream/  the format of the Rust crate
"""
