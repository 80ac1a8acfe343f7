"""Following a log that another process writes.

filewatch.py  wake-ups on file events; a poll is the truth
follower.py   the thread that reads the log and publishes what it finds
"""
