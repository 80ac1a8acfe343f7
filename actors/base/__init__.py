"""What every actor is built on: how it runs, how it gets mail, how it answers.

adapter.py  pykka, adapted: an actor restarts in place and always reports its end
answers.py  the futures that callers wait on, set without waiting
mailbox.py  the bounded mailbox of an actor, which can refuse
memory.py   what the store's own threads do when memory is short
threads.py  a thread that nobody waits for in vain
"""
