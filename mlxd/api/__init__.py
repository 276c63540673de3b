"""The dialects: each parses bytes into the one internal Request and renders the one internal event stream into bytes.

A dialect knows its own wire, the service and what is in `fields`; no other dialect. Its endpoints are coroutines over a Service and an
Exchange, listed in `mlxd/server.py`.
"""
