"""A scripted stand-in for Anthropic's Messages API, with a ledger of what it charged."""

from tests.servers.messages_server.script import (
    Ask,
    Charge,
    Fault,
    Reply,
    Script,
    ToolCall,
    say,
    steps,
)
from tests.servers.messages_server.server import LedgerEntry, MessagesServer

__all__ = [
    "Ask",
    "Charge",
    "Fault",
    "LedgerEntry",
    "MessagesServer",
    "Reply",
    "Script",
    "ToolCall",
    "say",
    "steps",
]
