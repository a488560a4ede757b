"""An E2B-compatible server for tests: the wire of the real SDK, real processes, scripted faults."""

from tests.servers.e2b_server.faults import Fault, api_error
from tests.servers.e2b_server.ledger import Entry, Ledger
from tests.servers.e2b_server.server import API_KEY, E2BServer
from tests.servers.e2b_server.world import Limits

__all__ = ["API_KEY", "E2BServer", "Entry", "Fault", "Ledger", "Limits", "api_error"]
