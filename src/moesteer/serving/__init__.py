"""`moesteer serve`: vLLM's own OpenAI-compatible server, whose requests may name a profile.

vLLM's launcher starts vLLM's app; one ASGI middleware stands around it. On the way in it turns the
name of a profile into what vLLM passes on to the engine; on the way out it asks the workers whether
that very request was steered, and says so in the reply's headers. Nothing but `serve` imports vLLM.
"""
