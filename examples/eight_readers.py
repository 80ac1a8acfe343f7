"""Eight threads read typed routes at full speed while another thread updates them."""

import tempfile
import threading

import foldlog
from foldlog import Put

folder = tempfile.TemporaryDirectory()
done, counts = threading.Event(), []


def read(routes: foldlog.View) -> None:
    reads = 0
    while not done.is_set():
        reads += routes["route/7"]["host"].startswith("10.0.")
    counts.append(reads)


with foldlog.open(f"{folder.name}/routes.log") as store:
    routes = foldlog.view(store, "json", "route/")
    routes.update({f"route/{n}": {"host": f"10.0.0.{n}"} for n in range(20)})
    threads = [threading.Thread(target=read, args=(routes,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for revision in range(1, 201):
        store.apply([Put(f"route/{revision % 20}", b'{"host": "10.0.1.%d"}' % revision)], revision)
    done.set()
    for thread in threads:
        thread.join()
    print(f"{len(counts)} threads read, all right: {all(counts)}; at {int(store.cursor())}")
folder.cleanup()
