"""The engines: a log and its fold in step, for one thread.

engine.py      a log and its fold, kept in step
append_log.py  AppendLogSnapshot: all of it behind the contract, for one thread
"""
