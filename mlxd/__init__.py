"""mlxd: the always-on local LLM server for MLX models.

Theory of operation
===================

One sentence says who owns what: **the supervisor owns every process; the server owns every request; an engine owns one model.**

MLX can abort the process that runs it: a Metal error throws on a completion thread, and nothing in Python can catch that. So the
process that holds a model is made expendable, and what must not be lost lives elsewhere:

- The *supervisor* (`supervisor.py`) binds the public port, spawns the server and the engines, learns of every exit from the
  kernel, and decides what happens next by asking a pure table (`policy.py`). It imports neither mlx nor a web framework: it idles
  at some 30 MB and sleeps until something happens. It is replaced in place (`handover.py`), and nobody notices.
- The *server* (`server.py`) speaks HTTP in several dialects (`api/`), admits requests (`admission.py`) and hands them to engines over
  unix sockets (`pool.py`). It never imports mlx, so generation and HTTP never share an interpreter lock, nor a fate.
- An *engine* (`engine/`) loads one model and runs continuous batches of mlx-lm over it. It has no network. When it dies, its requests
  are still in the server, and another engine takes them over.
- A *puller* (`pull.py`) brings one model from the hub (`hub.py`), and is there only meanwhile. It alone has the hub's token.

Every child holds one end of a socketpair, its *link* (`link.py`). Words on it are JSON lines (`messages.py`). A link that closes means
the other side is gone, so no child outlives its supervisor by more than five seconds.

Sampling is keyed: position i of a request draws with u = hash(seed, i), whoever shares its batch. So an answer does not depend on
its neighbours, and what one engine began another can go on with.

This module imports nothing, least of all mlx.
"""

__version__ = "0.1.0"
