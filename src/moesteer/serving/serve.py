"""Start vLLM's own server with our middleware around its app.

What can be refused is refused first, in seconds: names, files, and whether the profiles fit the
checkpoint. Then vLLM reads its own options and its own launcher runs; the profiles are loaded when
its engine is up, by the way that later ones take.
"""

import errno
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moesteer.engines.checkpoint import BUNDLED, resolve
from moesteer.engines.facts import facts_of_checkpoint
from moesteer.engines.vllm.directions import room_for
from moesteer.engines.vllm.names import NAME, NAME_RULE
from moesteer.engines.vllm.settings import with_room
from moesteer.engines.vllm_engine import ON_CPU
from moesteer.errors import MoesteerError
from moesteer.model_facts import ModelFacts
from moesteer.monitoring.reference import Reference, check_reference
from moesteer.monitoring.reference_file import load_reference
from moesteer.profile import Profile
from moesteer.profile_fit import check_model
from moesteer.serving.naming import short
from moesteer.serving.setup import ATTRIBUTE, Setup

ADMIN_KEY = "MOESTEER_ADMIN_KEY"
MIDDLEWARE = "moesteer.serving.middleware.Middleware"

USAGE = "moesteer serve MODEL --profile NAME=FILE … -- OPTIONS; vllm serve --help=all lists OPTIONS"

NOT_STARTED = ("initialization failed", "died with exit code 3")
"""How vLLM's launcher says that an engine did not start, or a server that was to run beside others
(3 is uvicorn's word for it)."""

ADDRESS_ERRORS = (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES)


def serve(
    model: str,
    profiles: Sequence[str],
    vllm_options: Sequence[str],
    *,
    host: str,
    port: int,
    admin_key_file: str | None = None,
    watch: str | None = None,
) -> None:
    """Serve until stopped; `profiles` are NAME=FILE, `watch` what requests are judged by.

    MoesteerError where that can't be.
    """
    if not 0 <= port <= 65535:
        raise MoesteerError(f"--port is {port}; it must be from 0 to 65535.")
    named = read_profiles(profiles)
    reference = None if watch is None else read_watch(watch)
    room = room_for(named.values())
    admin_key = read_admin_key(admin_key_file)
    args = parse(["--host", host, "--port", str(port), *vllm_options], model)
    facts = check_profiles(named, model, args)
    if reference is not None:
        check_reference(reference, facts)
    setup = Setup(named, facts, admin_key, watch=reference)
    check_args(args, setup)
    if room:
        args.additional_config = with_room(args.additional_config, room)
    args.middleware = [MIDDLEWARE, *args.middleware]
    setattr(args, ATTRIBUTE, setup)
    os.environ["MOESTEER_APART"] = "1"  # Ctrl-C is for the server, which ends its engine in order
    try:
        run(args)
    except SystemExit:  # how uvicorn says that the middleware could not begin
        if setup.failure is None:
            raise
    if setup.failure is not None:
        raise MoesteerError(setup.failure)


def read_profiles(given: Sequence[str]) -> dict[str, Profile]:
    """Profiles by name from NAME=FILE; MoesteerError for a wrong name, or one given twice."""
    named: dict[str, Profile] = {}
    for text in given:
        name, equals, file = text.partition("=")
        if not equals or not file:
            raise MoesteerError(f"--profile is {short(text)}; it must be NAME=FILE.")
        if not NAME.fullmatch(name):
            raise MoesteerError(f"--profile {short(text)}: {NAME_RULE}.")
        if name in named:
            raise MoesteerError(f"--profile names {name} twice; a name has one profile.")
        named[name] = Profile.load(file)
    return named


def read_watch(file: str) -> Reference:
    """What requests are judged by; MoesteerError where it is no such file, or is of replies."""
    reference = load_reference(Path(file))
    if reference.origin.over != "prompt":
        raise MoesteerError(
            f"{file} is of replies, and a server's headers come before the reply: fit one with"
            " --over prompt."
        )
    return reference


def read_admin_key(file: str | None) -> str | None:
    """The key from a file or else from the environment; None: nothing can be loaded later."""
    if file is None:
        key, where = os.environ.get(ADMIN_KEY), ADMIN_KEY
    else:
        try:
            key, where = Path(file).read_text(encoding="utf-8").strip(), file
        except (OSError, UnicodeDecodeError) as error:
            raise MoesteerError(f"{file} can't be read: {error}.") from None
    if key is not None and (not key or any(c.isspace() or not c.isprintable() for c in key)):
        raise MoesteerError(f"{where} holds no key: it must be one word.")
    return key


def check_profiles(named: dict[str, Profile], model: str, args: Namespace) -> ModelFacts:
    """The facts of the checkpoint; MoesteerError where it can't be steered or a profile misfits."""
    from vllm.renderers.chat_utils import load_chat_template

    template = load_chat_template(args.chat_template)
    dense = room_for(named.values()) > 0  # a direction needs no experts
    facts = facts_of_checkpoint(model, revision=args.revision, chat_template=template, dense=dense)
    for profile in named.values():
        check_model(profile, facts)
    return facts


def parse(options: Sequence[str], model: str) -> Namespace:
    """vLLM's arguments for its `serve`; its parser ends the program where it does not know one."""
    try:
        from vllm.entrypoints.cli.serve import ServeSubcommand
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
        from vllm.logger import configure_logging_from_args
        from vllm.platforms import current_platform
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError as error:
        raise MoesteerError(
            f"moesteer serve runs vLLM's server: pip install 'moesteer[vllm]' ({error})."
        ) from None
    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(usage=USAGE))
    served = ["--served-model-name", model] if model in BUNDLED else []
    if current_platform.is_cpu():  # as for --engine vllm; what the user says comes later and holds
        size = str(ON_CPU["kv_cache_memory_bytes"])
        served += ["--enforce-eager", "--kv-cache-memory-bytes", size]
    args = parser.parse_args([resolve(model), *served, *options])
    assert args is not None  # as its annotation has it
    args.model = args.model_tag
    configure_logging_from_args(args)
    try:
        ServeSubcommand().validate(args)
    except (TypeError, ValueError) as error:
        raise MoesteerError(f"vLLM refuses its options: {error}") from None
    return args


def check_args(args: Namespace, setup: Setup) -> None:
    """Refuse what would leave requests without their profile, or without the check of it."""
    if (args.additional_config or {}).get("moesteer", {}).get("profiles"):
        raise MoesteerError("give profiles as --profile NAME=FILE, not in --additional-config.")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "moesteer" not in allowed.split(","):
        raise MoesteerError(f"VLLM_PLUGINS is {allowed!r}, which leaves moesteer's plugin out.")
    unsupported = {
        "--grpc": getattr(args, "grpc", False),
        "VLLM_USE_RUST_FRONTEND": os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"),
    }
    for option, given in unsupported.items():
        if given:
            raise MoesteerError(f"{option} starts another server than the one that knows profiles.")
    if getattr(args, "enable_elastic_ep", False):
        raise MoesteerError(
            "--enable-elastic-ep adds engines while the server runs, which would lack the profiles."
        )
    if setup.admin_key is None:
        return
    many = "--data-parallel-multi-port-external-lb" if _supervised(args) else "--api-server-count"
    if _supervised(args) or (args.api_server_count or 1) > 1:
        raise MoesteerError(
            f"{many} starts several server processes, each with a list of profiles of its own: a"
            " profile loaded in one would be unknown to the others. Leave out the option or the"
            " admin key."
        )
    if not args.headless:
        args.api_server_count = 1  # by default, vLLM starts one for each data parallel engine


def run(args: Namespace) -> None:
    """vLLM's launcher; MoesteerError where the address can't be had or the engine doesn't start."""
    from pydantic import ValidationError
    from vllm.entrypoints.cli.serve import ServeSubcommand

    try:
        ServeSubcommand.cmd(args)
    except ValidationError as error:
        said = "; ".join(one["msg"].removeprefix("Value error, ") for one in error.errors())
        raise MoesteerError(f"vLLM refuses its options: {said}") from None
    except OSError as error:
        if error.errno not in ADDRESS_ERRORS:
            raise
        raise MoesteerError(f"{args.host}:{args.port} can't be had: {error.strerror}.") from None
    except RuntimeError as error:
        if not any(sign in str(error) for sign in NOT_STARTED):
            raise
        raise MoesteerError(
            "vLLM's processes did not start; what they say of the cause stands above."
        ) from None


def _supervised(args: Any) -> bool:
    return getattr(args, "data_parallel_multi_port_external_lb", False)
