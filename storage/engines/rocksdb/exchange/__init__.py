"""A store as a whole: checked, exported, imported, converted.

verify.py    every invariant, in code, and the facts of a database
reading.py   reading the state of a store that may be open elsewhere
artifact.py  export by checkpoint, and import
convert.py   from the append log, and to it
"""
