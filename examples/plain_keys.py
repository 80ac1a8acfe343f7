"""A plain key-value store: no cursors, no batches, nothing but keys that outlive the program.

python examples/plain_keys.py [LOG]
"""

import sys
import tempfile
from pathlib import Path

import foldlog

folder = tempfile.TemporaryDirectory()
log = sys.argv[1] if len(sys.argv) > 1 else Path(folder.name) / "settings.log"
with foldlog.open(log) as store:
    version = store.put("theme", b"dark")
    store.update("theme", b"light", expected=version)  # only if nobody wrote in between
    try:
        store.create("theme", b"blue")
    except foldlog.KeyExists as error:
        print(error.key, "is", store.get("theme").value.decode())
    store.put("font", b"serif")
    store.delete("font")
    print(list(store), store.get("font", "no font"))
folder.cleanup()
