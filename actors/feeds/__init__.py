"""Who hears of a change, and how: watches, subscribed actors, derived state.

bookmark.py      how far one subscriber has read, and how it is woken
delivery.py      delivers events to an actor
dispatcher.py    one thread that serves all subscribed actors
feeds.py         tells subscribers of changes without delaying the writer
prefixes.py      who sleeps until a key under a prefix changes
ring.py          the last commit groups, once for all subscribers
subscription.py  the events of one subscriber, in order
watch.py         a subscription read by a loop
"""
