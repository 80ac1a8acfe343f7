"""A service under a pre-fork server: each worker follows the feeder's log.

Run: gunicorn -w 4 gunicorn_flags:app. FLAGS_LOG is the path of the log, which another process feeds
through foldlog.open.
"""

import functools
import json
import os

import foldlog


@functools.cache
def flags(pid: int) -> foldlog.View:
    """This worker's view, opened on first use, after the fork."""
    return foldlog.view(foldlog.follow(os.environ["FLAGS_LOG"]), "json", "flags/")


def app(environ, start_response):
    """GET /NAME returns the flag; GET /healthz is the readiness probe."""
    view, name = flags(os.getpid()), environ["PATH_INFO"].lstrip("/")
    if name == "healthz":
        health = view.source.health()
        status, body = ("200 OK" if health.is_serving else "503 Not Ready"), list(health.reasons)
    else:
        body = view.get(f"flags/{name}")
        status = "404 Not Found" if body is None else "200 OK"
    start_response(status, [("Content-Type", "application/json")])
    return [json.dumps(body).encode()]
