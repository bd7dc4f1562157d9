"""Commands that share profiles through the Hub."""

from moesteer.commands.common import check_out


def push(
    profile: str,
    repo: str,
    /,
    *,
    run: list[str] | None = None,
    base_model: str | None = None,
    license: str | None = None,
    private: bool = False,
    dry_run: str | None = None,
) -> None:
    """Publish a profile on the Hub, with a model card that shows what was measured.

    Parameters
    ----------
    profile
        The profile file.
    repo
        The repository, OWNER/NAME; made where it is missing.
    run
        A folder of evaluate, search or detectors whose results the card is to show. May be
        repeated; evaluations must be of this very profile.
    base_model
        OWNER/NAME of the model on the Hub, for a profile that was made on a folder.
    license
        The profile's license, as the Hub calls it, e.g. apache-2.0.
    private
        Only you may see the repository.
    dry_run
        A folder to write everything to that would be published; nothing is uploaded.
    """
    from contextlib import nullcontext
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from moesteer.errors import MoesteerError
    from moesteer.hub.push import lay_out
    from moesteer.hub.push import push as upload
    from moesteer.report.terminal import print_text, profile_facts

    if private and dry_run is not None:
        raise MoesteerError("--private is for an upload, and --dry-run uploads nothing.")
    with nullcontext(dry_run) if dry_run is not None else TemporaryDirectory() as folder:
        published = lay_out(
            profile, repo, folder, runs=run or [], base_model=base_model, license=license
        )
        print_text(profile_facts(published))
        for path in sorted(Path(folder).iterdir()):
            print_text(f"{path.name}: {path.stat().st_size:,} bytes")
        if dry_run is None:
            print_text(f"pushed: {upload(folder, repo, private=private)}")
        else:
            print_text(f"written: {dry_run}; nothing was uploaded")


def pull(repo: str, /, *, out: str, revision: str | None = None) -> None:
    """Fetch a profile from the Hub, check it, and say what it does.

    Parameters
    ----------
    repo
        The repository, OWNER/NAME.
    out
        The profile to write.
    revision
        Branch, tag or commit of the repository.
    """
    from moesteer.hub.pull import pull as fetch
    from moesteer.report.terminal import print_text, profile_facts

    check_out(out)
    pulled = fetch(repo, out, revision)
    print_text(profile_facts(pulled.profile))
    print_text(f"written: {out}, from {repo} at commit {pulled.commit}")
