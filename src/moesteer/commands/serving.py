"""The command that serves a model, with profiles to choose from."""


def serve(
    model: str,
    /,
    *options: str,
    profile: list[str] | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    admin_key_file: str | None = None,
    watch: str | None = None,
) -> None:
    """Serve a model through vLLM to OpenAI clients; each request may name a profile.

    Parameters
    ----------
    model
        Name on the Hub, folder, or `testbed`.
    options
        vLLM's own, after `--`: `-- --tensor-parallel-size 2`; `vllm serve --help=all` lists them.
    profile
        NAME=FILE: a profile, and the name by which requests ask for it. May be repeated.
    host
        Address to listen at.
    port
        Port to listen at.
    admin_key_file
        A file with the key that loads and removes profiles while the server runs. Without it, the
        environment's MOESTEER_ADMIN_KEY; without either, nobody can.
    watch
        What `moesteer watch fit` wrote: each reply says in its headers, and /metrics of all, how
        far the request's routing is from ordinary. Prompts are then never read from the prefix
        cache.
    """
    from moesteer.serving.serve import serve as start

    start(
        model,
        profile or [],
        options,
        host=host,
        port=port,
        admin_key_file=admin_key_file,
        watch=watch,
    )
