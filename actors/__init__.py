"""The actors: writer, readers and supervisor, which make the engine a store for many threads."""
