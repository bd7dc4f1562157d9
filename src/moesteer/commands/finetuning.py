"""The command that fine-tunes a model on a task and watches its rationales."""

from dataclasses import replace

from moesteer.commands.common import DEFAULT, ModelOptions, command_line, load_engine


def finetune(
    model: str,
    /,
    *,
    task: str,
    dev: str,
    out: str,
    epochs: int = 10,
    full: bool = False,
    rate: float | None = None,
    batch_size: int = 16,
    rank: int = 16,
    methods: list[str] | None = None,
    limit_dev: int | None = None,
    plain: bool = False,
    checkpointing: bool = False,
    options: ModelOptions = DEFAULT,
    seed: int = 0,
) -> None:
    """Fine-tune a model on a task, and measure its rationales before and after each epoch.

    Parameters
    ----------
    model
        Name on the Hub, folder, or `testbed`; a dense model too.
    task
        Instances to train on, as for `rationale`.
    dev
        Instances to measure rationales on; none of them may be among those to train on.
    out
        A folder for checkpoints and results, for `report`. An interrupted run is taken up when
        started again. A checkpoint is a model of its own: give OUT/checkpoints/epoch-3 to any
        command.
    epochs
        How often the model is trained on every instance.
    full
        Train all weights, in float32 unless --dtype says otherwise; without it, low-rank adapters
        beside the attention's (LoRA, to be installed with moesteer[finetune]).
    rate
        The highest rate of AdamW; 2e-4 for adapters and 2e-5 for all weights if left out.
    batch_size
        Instances a step.
    rank
        The adapters' rank.
    methods
        Which rationales, as for `rationale`; without it, all that the model has.
    limit_dev
        Only the first so many instances of DEV.
    plain
        Without a chat template: the prompt is the text as it stands (base models).
    checkpointing
        Gradients in less memory and more time.
    seed
        Seed of the adapters, the order of the instances, random rationales and the intervals.
    """
    from moesteer.chat import parse_chat_options
    from moesteer.engines.transformers_engine import TransformersEngine
    from moesteer.errors import MoesteerError
    from moesteer.generate import check_limits
    from moesteer.rationale.explain import Settings, methods_of
    from moesteer.rationale.finetune import RATES, check_instances, check_training
    from moesteer.rationale.finetune import finetune as run_finetune
    from moesteer.rationale.instances import read_instances
    from moesteer.rationale.training import Training
    from moesteer.report.progress import counted_progress
    from moesteer.report.rationale_page import finetune_page
    from moesteer.report.terminal import print_text

    check_limits(1, 0, 1, seed)
    if options.engine != "transformers":
        raise MoesteerError(f"{options.engine} trains nothing; leave out --engine.")
    training = Training(
        rate=RATES["full" if full else "adapter"] if rate is None else rate,
        epochs=epochs,
        full=full,
        batch_size=batch_size,
        rank=rank,
        seed=seed,
    )
    check_training(training)
    if limit_dev is not None and limit_dev < 1:
        raise MoesteerError(f"--limit-dev is {limit_dev}; it must be at least 1.")
    train, measured = read_instances(task), read_instances(dev)[:limit_dev]
    check_instances(train, measured)
    if full and options.dtype == "auto":
        options = replace(options, dtype="float32")
    engine = load_engine(model, options, dense=True)
    assert isinstance(engine, TransformersEngine)
    settings = Settings(
        methods=methods_of(engine, methods, None),
        plain=plain,
        checkpointing=checkpointing,
        seed=seed,
    )
    summaries = run_finetune(
        engine,
        train,
        measured,
        training,
        settings,
        out=out,
        chat_options=parse_chat_options(options.chat_option or []),
        command=command_line(),
        stage=lambda title: counted_progress(title, "instances"),
    )
    print_text(finetune_page(summaries))
    print_text(f"written: {out}")
