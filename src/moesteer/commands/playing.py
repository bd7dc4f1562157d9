"""The command that opens the playground."""

from moesteer.commands.common import (
    DEFAULT,
    ModelOptions,
    command_line,
    load_engine,
    load_profile,
)


def play(
    model: str,
    /,
    *,
    with_: list[str] | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    password_file: str | None = None,
    options: ModelOptions = DEFAULT,
) -> None:
    """A web page: replies with and without steering side by side; switch experts by a click.

    Parameters
    ----------
    model
        Name on the Hub, folder, or `testbed`.
    with_
        Profiles to choose from.
    host
        Address to listen at. Other machines can reach another one than 127.0.0.1, so it needs a
        password.
    port
        Port to listen at; 0: any that is free.
    password_file
        A file whose first line is the password that the page asks for.
    """
    from moesteer.errors import MoesteerError
    from moesteer.playground.serve import listen, read_password, require_gradio, run
    from moesteer.profile_fit import check_model

    if options.engine == "vllm":
        raise MoesteerError(
            "moesteer play shows what each token selects as it comes, which it reads in"
            " transformers: leave out --engine vllm. moesteer serve is vLLM's server."
        )
    if options.tensor_parallel is not None or options.expert_parallel is not None:
        raise MoesteerError(
            "moesteer play runs the model in one process: place it by --device and --max-memory"
            " instead of splitting it."
        )
    require_gradio()
    from moesteer.engines.transformers_engine import TransformersEngine
    from moesteer.playground.asking import Played

    password = read_password(password_file, host)
    profiles = [profile for profile in map(load_profile, with_ or []) if profile is not None]
    with listen(host, port) as listening:
        engine = load_engine(model, options, dense=any(p.directions for p in profiles))
        for profile in profiles:
            check_model(profile, engine.facts)
        assert isinstance(engine, TransformersEngine)
        played = Played(engine, profiles, options.chat_option or [], command_line())
        run(played, listening, password, host)
