"""Close connections that idle, dribble or do not read, so that they lock out no other client."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

CHECK_SECONDS, MOST_CONNECTIONS = 10.0, 200
LEAST_BYTES = 10_000  # of a request that have to come in CHECK_SECONDS: a slow upload does, a dribbling one does not


class WatchedProtocol(H11Protocol):
    """HTTP of uvicorn, which by itself waits without end for a request, for its body, and for a client that reads.

    Each CHECK_SECONDS a connection is checked. It is closed if since the last check its request neither ended nor
    gained LEAST_BYTES, or if the client read nothing. If there are more than MOST_CONNECTIONS, the oldest one that
    waits for a request is closed.
    """

    received = 0  # bytes so far

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.opened, self.last_seen, self.received_before = self.loop.time(), None, 0
        self.next_check = self.loop.call_later(CHECK_SECONDS, self.check)
        if len(self.connections) > MOST_CONNECTIONS:
            min(filter(WatchedProtocol.awaits_request, self.connections), key=lambda one: one.opened).transport.abort()

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.next_check.cancel()
        super().connection_lost(exc)

    def awaits_request(self) -> bool:
        """Return whether a request, or the rest of one, is still to come."""
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def check(self) -> None:
        """Close the connection if it waits for the client, and did so in the same place at the last check."""
        waits = self.awaits_request() or self.flow.write_paused
        seen: Any = (self.cycle, self.conn.their_state, self.transport.get_write_buffer_size()) if waits else None
        if waits and seen == self.last_seen and self.received - self.received_before < LEAST_BYTES:
            self.transport.abort()
        else:
            self.last_seen, self.received_before = seen, self.received
            self.next_check = self.loop.call_later(CHECK_SECONDS, self.check)
