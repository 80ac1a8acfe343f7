"""A connection to NATS, and requests to the API of its JetStream. Says why it fails, in the terms
of the seam, and without secrets.

nats-py makes the connection. It never reconnects by itself, since what it would resume is unknown:
a lost connection stays lost, and the link attaches again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote, unquote, urlsplit

from foldlog.protocol.upstream import UpstreamLost, UpstreamMissing, UpstreamRefused
from foldlog.upstreams.nats_wire import Wire

if TYPE_CHECKING:
    from nats.aio.client import Client

CONNECT_S = 5.0
REQUEST_S = 5.0
CLOSE_S = 0.5
"""After a failed TLS handshake, nats-py waits for ever for its connection to close."""
RETRY_S = 0.02
"""Between two attempts to reach a server. Longer back-off is up to the link."""
_NOT_FOUND, _NO_MESSAGE, _NOT_ENABLED = 10059, 10037, 10039


class NoMessage(UpstreamLost):
    """The stream has no message at a sequence."""


class Connection:
    """One connection: `open` it once, `close` it once."""

    def __init__(
        self, who: str, servers: list[str], options: dict[str, Any], api: str = "$JS.API"
    ) -> None:
        """`options`: as nats-py names them; those that are None are left out."""
        self.who, self._servers, self._api = who, servers, api
        self._options = {name: value for name, value in options.items() if value is not None}
        self._secrets = secrets_of(servers, options)
        nats, self._errors = _nats()
        self.client: Client = nats.aio.client.Client()
        self.is_lost = False
        self.denied = asyncio.Event()
        """Set once the server denies a permission."""
        self._error = self._said = ""  # what the server said last, as told and in full
        # nats-py has no public way to read messages as they come: see `nats_wire`.
        client = cast(Any, self.client)
        self.wire = client._ps = Wire(client._ps)
        schemes = {urlsplit(server).scheme for server in servers}
        if "tls" in schemes or (options.get("tls") and "nats" in schemes):
            client._connect_command = self._over_tls(client, client._connect_command)

    async def open(self) -> None:
        """UpstreamRefused if the server refuses the credentials or its certificate is not trusted;
        UpstreamLost if it cannot be reached."""
        try:
            async with asyncio.timeout(CONNECT_S + 1):
                await self.client.connect(
                    self._servers,
                    allow_reconnect=False,
                    # By default, a first connection is tried 60 times, 2 s apart.
                    max_reconnect_attempts=1,
                    reconnect_time_wait=cast(int, RETRY_S),
                    connect_timeout=int(CONNECT_S),
                    ping_interval=5,
                    max_outstanding_pings=2,
                    error_cb=self._on_error,
                    closed_cb=self._on_lost,
                    disconnected_cb=self._on_lost,
                    name="foldlog",
                    **self._options,
                )
        except (OSError, TimeoutError, self._errors.Error) as error:
            await self.close()
            raise self._connect_error(error) from None
        except ImportError:  # of what reads credentials
            await self.close()
            raise UpstreamRefused(
                f"{self.who}: credentials need nkeys: pip install 'nats-py[nkeys]'"
            ) from None
        except ValueError as error:  # credentials that nats-py cannot read
            await self.close()
            raise UpstreamRefused(f"{self.who}: {self.clean(error)}") from None
        except (LookupError, TypeError, AttributeError):  # in nats-py, of what the server said
            await self.close()
            raise UpstreamLost(f"{self.who}: the server is not a NATS server") from None
        except BaseException:
            await self.close()
            raise

    def _over_tls(self, client: Any, connect_command: Callable[[], bytes]) -> Callable[[], bytes]:
        """`connect_command`, which has the credentials, but UpstreamRefused if it would be sent in
        the clear. nats-py leaves it to the server whether there is TLS."""

        def command() -> bytes:
            if not client._server_info.get("tls_required"):
                raise UpstreamRefused(f"{self.who}: TLS is asked for, and the server has none")
            return connect_command()

        return command

    def _connect_error(self, error: Exception) -> Exception:
        told = self._error if isinstance(error, self._errors.NoServersError) else ""
        reason = told or self.clean(error) or type(error).__name__
        said = f"{error} {self._said}".lower()
        if "authorization" in said or "authentication" in said:
            return UpstreamRefused(f"{self.who} refuses the credentials: {reason}")
        if isinstance(error, ssl.SSLCertVerificationError) or "certificate verify failed" in said:
            return UpstreamRefused(f"{self.who}: its certificate is not trusted: {reason}")
        return UpstreamLost(f"{self.who} cannot be reached: {reason}")

    async def _on_error(self, error: Exception) -> None:
        if self.denied.is_set():
            return
        self._error, self._said = self.clean(error), str(error).lower()
        # Consumers that cannot be deleted remove themselves; few servers need to be asked where
        # one is.
        spared = "consumer.delete" in self._said or "consumer.info" in self._said
        if "permissions violation" in self._said and not spared:
            self.denied.set()

    async def _on_lost(self) -> None:
        self.is_lost = True
        for receiver in self.wire.receivers.values():
            receiver.wake()

    def check(self) -> None:
        """UpstreamLost if the connection is lost, UpstreamRefused if a permission was denied."""
        if self.denied.is_set():
            raise UpstreamRefused(f"{self.who}: {self._error}")
        if self.is_lost or not self.client.is_connected:
            raise UpstreamLost(f"{self.who}: the connection is lost")

    def clean(self, error: BaseException) -> str:
        """The text of an error, without secrets."""
        text = str(error)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    async def request(self, subject: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request of the JetStream API. UpstreamLost, UpstreamMissing or
        UpstreamRefused."""
        self.check()
        asked = asyncio.ensure_future(
            self.client.request(
                f"{self._api}.{subject}", json.dumps(body).encode(), timeout=REQUEST_S
            )
        )
        denied = asyncio.ensure_future(self.denied.wait())
        try:
            await asyncio.wait({asked, denied}, return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                self.check()
            answer: dict[str, Any] = json.loads(asked.result().data)
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            # nats-py cancels what waits for an answer when its connection ends.
            raise UpstreamLost(f"{self.who}: the connection is lost") from None
        except self._errors.NoRespondersError:
            raise UpstreamLost(f"{self.who}: JetStream does not answer") from None
        except (OSError, TimeoutError, ValueError, self._errors.Error) as error:
            self.check()
            raise UpstreamLost(f"{self.who}: {self.clean(error) or type(error).__name__}") from None
        finally:
            await _cancelled(asked, denied)
        if "error" in answer:
            raise self._api_error(answer["error"])
        return answer

    def _api_error(self, error: dict[str, Any]) -> Exception:
        code = error.get("err_code")
        if code == _NOT_FOUND:
            return UpstreamMissing(f"{self.who}: the bucket does not exist")
        if code == _NOT_ENABLED:
            return UpstreamRefused(f"{self.who}: JetStream is not enabled for this account")
        reason = f"{self.who}: {error.get('description', error)}"
        return NoMessage(reason) if code == _NO_MESSAGE else UpstreamLost(reason)

    async def tell(self, subject: str, body: bytes, reply: str) -> None:
        """Send a request of the API whose answer, if any, goes to `reply`."""
        try:
            await self.client.publish(f"{self._api}.{subject}", body, reply)
        except (OSError, self._errors.Error) as error:
            raise UpstreamLost(f"{self.who}: {self.clean(error)}") from None

    async def close(self) -> None:
        """Close it, within `CLOSE_S`. nats-py would leave the transport open where it gives up."""
        if not self.client.is_closed:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(CLOSE_S):
                    await self.client.close()
        transport: Any = cast(Any, self.client)._transport
        if transport is not None:
            with contextlib.suppress(Exception):
                transport.close()


async def _cancelled(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def secrets_of(servers: list[str], options: dict[str, Any]) -> list[str]:
    """Every form in which a secret may turn up in an error, longest first."""
    found = {options.get("password"), options.get("token")}
    for server in servers:
        parts = urlsplit(server)
        found.add(parts.password or parts.username)  # a user without a password is a token
    forms = {secret for secret in found if secret}
    forms |= {unquote(secret) for secret in forms}
    forms |= {quote(secret, safe) for secret in forms for safe in ("", "/")}
    return sorted(forms, key=len, reverse=True)


def checked_url(url: str) -> str:
    """ValueError unless `url` is the address of a server. The error shows nothing of it, because it
    may contain a password."""
    url = url.strip()
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("nats", "tls", "ws", "wss") and bool(parts.hostname)
        _ = parts.port
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(
            "an address is nats://HOST:PORT or tls://HOST:PORT; write / ? # in a password as "
            "%2F %3F %23"
        )
    return url


def bare(url: str) -> str:
    """An address without its user and password."""
    parts = urlsplit(url)
    port = f":{parts.port}" if parts.port else ""
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{parts.scheme}://{host}{port}"


def _nats() -> tuple[Any, Any]:
    try:
        import nats.aio.client
        import nats.errors
    except ImportError:
        raise UpstreamRefused("NatsKv needs nats-py: pip install 'foldlog[nats]'") from None
    return nats, nats.errors
