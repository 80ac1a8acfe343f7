"""An asyncio program: one task feeds a store, another watches it, and a follower waits for a
write."""

import asyncio
import tempfile

from foldlog import Changed, Put, aio


async def feed(store: aio.AsyncStore) -> None:
    for revision in range(1, 101):
        await store.apply([Put(f"price/{revision % 5}", b"%d" % revision)], revision)


async def show(store: aio.AsyncStore) -> None:
    async for event in store.watch("price/0"):
        if isinstance(event, Changed) and int(event.cursor) == 100:
            print("price/0 is", event.update.value.decode())
            return


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with aio.open(f"{folder}/p.log") as store, aio.follow(f"{folder}/p.log") as other:
            await asyncio.gather(feed(store), show(store))
            version = await store.put("closed", b"yes")
            await other.wait_for(seq=version)
            print("the follower has", len(other), "keys; closed:", other.get("closed").value)


asyncio.run(main())
