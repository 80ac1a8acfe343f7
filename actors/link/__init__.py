"""The link that feeds a mirror from its upstream.

attachment.py  one attachment to the upstream
auditing.py    finds what no change told
checking.py    what an upstream gives has the types of the seam
intake.py      what the link gives to its store, one batch at a time
link.py        the link's thread: attach, let go, try again
progress.py    what the link reports
resuming.py    what the link decides, as pure functions
tail.py        applies the changes as they come
"""
