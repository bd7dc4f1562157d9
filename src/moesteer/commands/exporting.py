"""The command that hands a profile to another program."""


def export(profile: str, /, *, out: str) -> None:
    """Write a profile's added directions as a control vector for llama.cpp (GGUF).

    Parameters
    ----------
    profile
        A profile whose directions are only added, to what enters a layer, at all tokens.
    out
        The GGUF file to write; to be given to llama.cpp as --control-vector.
    """
    from pathlib import Path

    from moesteer.commands.common import check_out
    from moesteer.files import sole_writer
    from moesteer.gguf_export import export_gguf
    from moesteer.profile import Profile
    from moesteer.report.terminal import print_text

    check_out(out, profile)
    loaded = Profile.load(profile)
    with sole_writer(Path(out)):
        written = export_gguf(loaded, out)
    print_text(f"written: {out} with {', '.join(f'direction.{number}' for number in written)}")
