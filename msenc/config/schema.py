"""What a config may hold.

Hydra composes YAML onto the dataclasses below, so a misspelt key or a wrong type is an error wherever it stands; then
`check_targets` (checks.py) binds every ``_target_`` node to its constructor's signature. The configs are the only place
where omegaconf and hydra meet msenc: `pipelines` hands plain values on.
"""

from dataclasses import dataclass, field, is_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, BooleanNode, DictConfig, OmegaConf

from msenc.config.hints import nearest
from msenc.types import MsencError

OPEN = {
    "train_schema": ("optimizer.groups", "loss.weights", "data.drop", "margins"),
    "report_schema": ("names", "decimals", "margins"),
    "respond_schema": ("encoders",),
}
"""Places whose keys are names that no schema lists: an override adds one without a ``+``."""


@dataclass
class StreamConfig:
    """One stream: what encodes it, and how it looks in the shards.

    Args:
        name: names the features (``audio-<name>/``); the datamodule compares it with what was prepared.
        dim: width D of the features.
        encoder: the ``_target_`` node that `prepare.py` builds.
    """

    name: str = MISSING
    dim: int = MISSING
    encoder: Any = MISSING


@dataclass
class ModelConfig:
    """The composed model.

    Args:
        llm: ``_target_`` node of the LLM.
        llm_recipe: how `prepare.py` makes the LLM's folder when it is missing; None for models that exist.
        streams: what the modality brings.
        connector: ``_target_`` node, built once per stream with its ``in_dim``; None without streams.
        tie_connectors: let all streams share one connector core (upstream does, unsaid).
        layout: ``dialogue`` (one row trains all targets that share a history) or ``sample`` (one row per target).
    """

    llm: Any = MISSING
    llm_recipe: Any = None
    streams: dict[str, StreamConfig] = field(default_factory=dict)
    connector: Any = None
    tie_connectors: bool = False
    layout: str = "dialogue"


@dataclass
class VoiceConfig:
    """How `prepare.py describe=true` describes voices; the keys of `msenc.speech.attributes.VoiceSettings`.

    Args:
        levels: words per attribute, 2 or 3.
        genders: speaker -> woman or man, where you know it.
        edges: attribute -> thresholds between its words; others are fitted on the train split.
        overwrite: replace descriptions that the data set has.
        seed: of the wording.
        loudness: ``relative`` to the recording's clips, or ``absolute``.
        writer: model that words the descriptions; None takes templates.
        writer_url: of its server, up to and with ``/v1``; None: that of ``OPENAI_BASE_URL``.
    """

    levels: int = 3
    genders: dict[str, str] = field(default_factory=dict)
    edges: dict[str, list[float]] = field(default_factory=dict)
    overwrite: bool = False
    seed: int = 1
    loudness: str = "relative"
    writer: str | None = None
    writer_url: str | None = None


@dataclass
class SplitConfig:
    """How dialogues that say no split get one; `msenc.raw.splits.split_dialogues`.

    Args:
        rule: ``random``, ``by_video`` (all dialogues of a recording in one split), or ``official`` (MSenC's own).
        fractions: split -> its share of the dialogues.
        seed: of the drawing.
    """

    rule: str = "random"
    fractions: dict[str, float] = field(default_factory=lambda: {"train": 0.8, "val": 0.1, "test": 0.1})
    seed: int = 1


@dataclass
class RecordingsConfig:
    """How recordings become utterances (docs/own-data.md).

    Args:
        segment: ``_target_`` node: when an utterance ends.
        recogniser: ``_target_`` node: sound -> words.
        speaker_encoder: ``_target_`` node: sound -> a vector that tells the voice.
        split: of the dialogues.
        channels: ``mix`` of them is listened to; ``speakers``: each holds one speaker.
    """

    segment: Any = MISSING
    recogniser: Any = MISSING
    speaker_encoder: Any = MISSING
    channels: str = "mix"
    split: SplitConfig = field(default_factory=SplitConfig)


@dataclass
class DataConfig:
    """A data set: where it lies, and how it is read.

    Args:
        name: begins every dialogue's id.
        dir: the prepared data (shards, dataset.json); `prepare.py` writes it. A path, or where it is only read a URL.
        root: the raw material; only `prepare.py` reads it.
        generate: ``_target_`` node that makes the raw material when it is missing (the demo), else None.
        table: CSV file of utterances; None: ``utterances.csv`` in `root` if there is one, else what the recordings say.
        encoding: of the tables (``gb18030``, ``cp1251``, ...); None: UTF-8 or UTF-16, with rows of cp1252 repaired.
        recordings: how recordings become utterances; None: `root` is in MELD's layout, or in `layout`.
        layout: ``_target_`` node of a published data set's layout (docs/data-sets.md); None for the others.
        audio_track: number of the track of audio that is read, from 1 on; None: the one marked as default.
        labels: columns of the table that `prepare.py` keeps for connectors to be aligned to; None keeps all that are
            read as nothing else.
        voice: how `prepare.py` describes voices.
        batch_size: dialogues per batch, of all processes together; None where `max_tokens_per_batch` is set.
        max_tokens_per_batch: tokens per batch, of all processes together: text, media queries and padding.
        val: ``val``, the split that is validated on while training. A share (0.1): `prepare.py` draws it from train,
            where the annotations have none. None: nothing is validated on, and the last checkpoint is the best.
        num_workers: processes that prepare data, or load it while training.
        max_history_tokens: most text tokens of a target's history; older turns are dropped, counted and reported.
        verify: hash every shard of a split before its first use.
        filter: ``no_<flag>``, or a list of them: what carries such a flag of the audit is left out of what is read.
        control: ``noise_audio`` and the like: what stands in a stream's place, in training too (docs/controls.md).
        drop: stream -> share of the turns that lack it in training, drawn anew in each epoch (modality dropout).
    """

    name: str = MISSING
    dir: str = MISSING
    root: str = MISSING
    generate: Any = None
    table: str | None = None
    encoding: str | None = None
    recordings: RecordingsConfig | None = None
    layout: Any = None
    audio_track: int | None = None
    labels: list[str] | None = None
    voice: VoiceConfig = field(default_factory=VoiceConfig)
    batch_size: int | None = None
    max_tokens_per_batch: int | None = None
    val: Any = "val"
    num_workers: int = 0
    max_history_tokens: int = 1024
    verify: bool = True
    filter: Any = field(default_factory=list)
    control: str | None = None
    drop: dict[str, float] = field(default_factory=dict)


@dataclass
class LabelsConfig:
    """What a stream's utterances are known by; the keys of `msenc.training.align.Source`.

    Args:
        source: ``description`` (the measured voice), ``column`` (of the data's table) or ``transcript``.
        column: which column, such as Emotion.
        attributes: of the voice.
    """

    source: str = MISSING
    column: str | None = None
    attributes: list[str] = field(default_factory=lambda: ["pitch", "range"])


@dataclass
class AlignConfig:
    """How connectors are aligned before dialogues (docs/training.md).

    Args:
        labels: stream -> what its utterances are known by; a stream that is not named here is not aligned.
        template: how a label is written, around ``{words}``; transcripts stand as they are.
        objective: ``embeddings``, ``contrastive`` or ``llm``; the rest are `msenc.models.alignment.AlignmentSettings`.
        keep: how much of a new connector's own output stays beside the labels.
        steps: of alignment.
        batch_size: utterances per step.
        lr: the highest rate.
        warmup_steps: until it is reached.
        weight_decay: of the connectors.
        temperature: of the contrastive objective.
        seed: of the order of utterances.
    """

    labels: dict[str, LabelsConfig] = field(default_factory=dict)
    template: str = "[{words}]"
    objective: str = "embeddings"
    keep: float = 0.0
    steps: int = 150
    batch_size: int = 64
    lr: float = 3e-3
    warmup_steps: int = 20
    weight_decay: float = 0.01
    temperature: float = 0.07
    seed: int = 1


@dataclass
class InitFromConfig:
    """What a run starts from; ``init_from=RUN`` is ``init_from.run=RUN``.

    Args:
        run: folder of the run whose connectors and adapter are taken, what of them this run has.
        connectors: folder of the run whose connectors are taken.
        adapter: folder of the run whose adapter (or LLM, where all of it was trained) is taken.
        checkpoint: ``best`` or ``last``.
    """

    run: str | None = None
    connectors: str | None = None
    adapter: str | None = None
    checkpoint: str = "best"


@dataclass
class LossConfig:
    """What training minimises: the cross entropy of the target tokens.

    Args:
        weights: kind of token (`prompt.TOKEN_KINDS`) -> its weight in the training loss, 1 for kinds that are not
            named; what is evaluated has no weights.
    """

    weights: dict[str, float] = field(default_factory=dict)


@dataclass
class ObjectiveConfig:
    """Preference tuning by DPO (docs/preference.md).

    Args:
        beta: how much a deviation from the start counts; as `beta` of TRL's DPOConfig.
        label_smoothing: share of pairs that are taken to be the wrong way round; as that of TRL's ``robust`` loss.
        rpo_alpha: weight of the preferred reply's own loss, the mean over its tokens; as of TRL's ``sft`` loss.
        pairs: ``conflict``, ``wrong`` (`msenc.data.preferences`), or a CSV file.
        labels: of the turns, that make pairs without a table; None: as of `EvaluateConfig`'s ``conflict=true``.
    """

    beta: float = MISSING
    label_smoothing: float = MISSING
    rpo_alpha: float = 0.0
    pairs: str = MISSING
    labels: list[str] | None = None


@dataclass
class PathsConfig:
    """Where things lie; relative paths are relative to the folder of the command.

    Args:
        data_dir: prepared data, raw material of the demo, and its LLM.
        cache_dir: local copies of prepared data that lies behind a URL; may be deleted at any time between runs.
        cache_max_bytes: that copies of shards may take there; None: no limit.
        runs_dir: runs, one folder each.
        output_dir: the folder of this run; None until `runs.folder` has settled it.
    """

    data_dir: str = MISSING
    cache_dir: str = MISSING
    cache_max_bytes: int | None = None
    runs_dir: str = MISSING
    output_dir: str | None = None


@dataclass
class TrainConfig:
    """Schema of ``train.yaml``.

    Args:
        plan: what the run would take is printed, and nothing trains.
        dry_run: the jobs of the sweep are listed with what they would take, and none starts.
        detach: the sweep's process ends when its jobs are submitted to Slurm.
        seed: of initial weights, order and dropout.
        modality: streams that the model takes, in words; chosen by its group.
        model: LLM, streams and connectors.
        data: what is trained on.
        prompt: ``_target_`` node: how a dialogue is written for the LLM.
        scheduler: ``_target_`` node of the learning rate's course; None keeps it.
        loss: what is minimised.
        trainer: ``_target_`` node of Lightning's Trainer: devices, steps, precision.
        callbacks: name -> ``_target_`` node.
        logger: name -> ``_target_`` node.
        decoding: how replies are generated (docs/evaluation.md).
        prepare_workers: processes that prepare missing data.
        paths: where things lie.
        threads: of torch, whose number decides how sums are rounded; None: OMP_NUM_THREADS, or what suits the model.
        align: how connectors are aligned first; None does not.
        init_from: what another run has trained, to start from.
        objective: preferences between replies; None: the likelihood of the data's.
        stage: ``align`` ends when the connectors are aligned; None goes on with dialogues.
        evaluate: the split that is evaluated when training ends; None for none.
        control: of that evaluation, as in `EvaluateConfig`.
        margins: of the sweep's report, and of its dry run: as in `ReportConfig`.
        optimizer: ``_target_`` node: parameters -> optimizer; of it, ``groups`` says which parameters train with other
            settings (docs/training.md).
        resume: a run's folder, which is continued as it was started; or ``auto``: continue what the same command
            began and did not finish, or skip what it has finished.
        plugins: modules of one's own that register what may be built (`config.targets`); no stored config's count.
        urls: addresses that a stored config may name: it is asked at none that the command line does not name, too.
    """

    plan: bool = False
    dry_run: bool = False
    detach: bool = False
    seed: int = 1
    threads: int | None = None
    modality: str = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prompt: Any = MISSING
    align: AlignConfig | None = None
    init_from: InitFromConfig = field(default_factory=InitFromConfig)
    objective: ObjectiveConfig | None = None
    stage: str | None = None
    optimizer: Any = field(default_factory=lambda: DictConfig({"groups": {}}))
    scheduler: Any = None
    loss: LossConfig = field(default_factory=LossConfig)
    trainer: Any = MISSING
    callbacks: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    decoding: Any = MISSING
    evaluate: str | None = "test"
    control: Any = None
    margins: dict[str, float] = field(default_factory=dict)
    prepare_workers: int = 2
    resume: str | None = None
    paths: PathsConfig = field(default_factory=PathsConfig)
    plugins: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)


@dataclass
class PrepareConfig:
    """Schema of ``prepare.yaml``.

    Args:
        stage: None makes shards, ``audit`` looks the raw material through; ``segment``, ``transcribe`` and ``speakers``
            go no further than that with recordings.
        describe: measure the voices and describe them, as `data.voice` says; ``measure`` leaves the descriptions as
            they are; None: as the folder was prepared before, or as `align` needs it.
        align: what connectors are to be aligned to; voices that it asks for are measured.
        prepare_workers: processes that decode clips; 0 works in this one.
        modality: streams whose features are made; chosen by its group.
        model: the streams' encoders, and the LLM that is made where it is missing.
        data: what is prepared.
        prompt: as in `TrainConfig`.
        paths: where things lie.
        part: ``3/16`` does the third of 16 parts; the last one to end makes the shards.
        status: say what is done and missing, of all and of each of `part`'s parts, and prepare nothing.
        recogniser: a Whisper by id or folder that writes recordings down, as `respond.py` names one; None: as
            `data.recordings.recogniser` says.
        plugins: see `TrainConfig`.
    """

    stage: str | None = None
    modality: str = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prompt: Any = MISSING
    align: AlignConfig | None = None
    describe: Any = None
    prepare_workers: int = 2
    part: str | None = None
    status: bool = False
    recogniser: str | None = None
    paths: PathsConfig = field(default_factory=PathsConfig)
    plugins: list[str] = field(default_factory=list)


@dataclass
class EvaluateConfig:
    """Schema of ``evaluate.yaml``.

    Args:
        run_dir: a run, a sweep's folder or another above several runs, or a list of these; each run's model and data
            are rebuilt from its own config.
        split: ``train``, ``val`` or ``test``.
        checkpoint: ``best``, ``last``, or a file.
        decoding: settings of transformers' GenerationConfig, and ``batch_size`` (replies decoded at once).
        generate: False measures losses alone.
        metrics: of replies (docs/metrics.md); the cheap ones by default.
        metric_settings: name of a metric -> its settings: ``metric_settings.embedding_similarity.name_or_path=FOLDER``;
            and ``tokenizer``, of all metrics that count words.
        speech: ``_target_`` node of the synthesizer that speaks the replies; None leaves them as text.
        speech_workers: processes that speak, started by each of the evaluation's; 0 works in these.
        recogniser: a Whisper by id or folder that the spoken replies are checked by; None leaves that out.
        speech_metrics: of the sound: ``mos``, ``speaker_similarity``.
        control: what is taken from the input in evaluations beside the plain one (docs/controls.md): a name, a list,
            or ``shuffle`` for the words of the history and for every stream of the run.
        control_draws: how often each control draws what stands in a stream's place.
        conflict: measure whether the run follows the words, the voice or the face where they contradict each other
            (docs/conflict.md): true, or the names of labels.
        missing: streams; losses are measured with 0 to 100 % of their turns (docs/controls.md).
        trace: probe where on its way through the model each label of a stream is lost (docs/trace.md).
        limit: first dialogues of the split; None for all.
        device: torch's name of the device, for the run's model and for those of metrics; ``auto`` takes a GPU if there
            is one.
        trainer: of it, ``accelerator``, ``devices`` and ``num_nodes``: processes that share the targets out; None:
            this one.
        data_dir: where the data and the tiny LLM lie now, if they have moved since the run.
        on_data: folder or URL of other prepared data to evaluate on; a run's own data.filter is left out there.
        overwrite: measure again what was measured before with the same settings.
        track: add what is measured to the run where it is tracked (TensorBoard, W&B, MLflow).
        plugins: see `TrainConfig`.
        urls: see `TrainConfig`.
    """

    run_dir: Any = MISSING
    split: str = "test"
    checkpoint: str = "best"
    decoding: Any = MISSING
    generate: bool = True
    metrics: list[str] = field(default_factory=list)
    metric_settings: dict[str, Any] = field(default_factory=dict)
    speech: Any = None
    speech_workers: int = 2
    recogniser: str | None = None
    speech_metrics: list[str] = field(default_factory=list)
    control: Any = None
    control_draws: int = 8
    conflict: Any = None
    missing: Any = None
    trace: bool = False
    limit: int | None = None
    device: str = "auto"
    trainer: Any = None
    data_dir: str | None = None
    on_data: str | None = None
    overwrite: bool = False
    track: bool = True
    plugins: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)


@dataclass
class ReportConfig:
    """Schema of ``report.yaml``.

    Args:
        sweep_dir: a sweep's folder, a run's, one above several, or a list of these; the report goes into the first.
        split: whose evaluations are compared.
        settings: settings of the evaluations (or their hash), where there are several of the split.
        title: of the page; None: what is compared.
        metrics: those to report, in this order; empty: all.
        names: metric, key, value, configuration or cost -> what is written in its place.
        decimals: of all metrics, or metric -> decimals; by default 1 of percentages, else 3.
        percent: metrics from 0 to 1 that are written in percent.
        spread: ``ci``: means with half of their interval; ``sd``: with the standard deviation between seeds.
        layout: ``booktabs``, ``markdown`` or ``csv``: the paper's table is printed so, and nothing else.
        margins: metric -> the largest difference that counts as none; by default the noise floor's.
        noise_floor: folder of a sweep=noise_floor with the settings of one of the rows.
        listen: write a page for listeners: true or ``ab`` plays two replies side by side, ``rating`` one.
        listen_trials: that each listener hears, beside attention checks.
        listen_seed: of the choice of replies, and of each listener's order.
        listen_consent: what listeners agree to; None: a usual text.
        answers: folder with the CSV files that listeners of such a page sent.
    """

    sweep_dir: Any = MISSING
    split: str = "test"
    settings: str | None = None
    title: str | None = None
    metrics: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    decimals: Any = field(default_factory=dict)
    percent: list[str] = field(default_factory=list)
    spread: str = "ci"
    layout: str | None = None
    margins: dict[str, float] = field(default_factory=dict)
    noise_floor: str | None = None
    listen: Any = None
    listen_trials: int = 24
    listen_seed: int = 1
    listen_consent: str | None = None
    answers: str | None = None


@dataclass
class RespondConfig:
    """Schema of ``respond.yaml``.

    Args:
        run_dir: the run that replies, its export, or ``hub:REPO[@REVISION]``; the page, which takes runs alone, may do
            without, and then begins with the newest.
        base: of an export, hub id or folder of its base LLM, where that was a local folder, or has moved.
        encoders: of an export, stream -> hub id or folder of its encoder's model, likewise.
        checkpoint: ``best``, ``last``, or a file.
        device: torch's name of the device; ``auto`` takes a GPU if there is one.
        data_dir: where the data and the tiny LLM lie now, if they have moved since the run.
        decoding: how replies are generated.
        text: what the user says; None where it is to be recognised from the sound, or the history is answered.
        audio: sound of the user's turn; that of `video` if None.
        video: picture of the user's turn.
        history: JSON file with the turns before: ``{"turns": [{"speaker": ..., "text": ..., "audio": ...}, ...]}``.
        speaker: the user's name; by default one that the run knows.
        reply_as: the agent's name.
        num_replies: alternatives; more than one needs ``decoding=sample``.
        seed: of what is drawn.
        out: folder for reply.json and reply.wav; by default a new one in the run's ``replies/``.
        speech: the synthesizer's node, or None for no sound.
        recogniser: Whisper (id or folder) that recognises words where none are given.
        max_clip_s: longest clip that is taken, in seconds.
        page: serve a page to talk to a run, instead of answering one turn.
        runs_dir: the runs that the page offers, beside `run_dir`.
        host: address that the page is served at.
        port: of the page; None takes the first free one from 7860 on.
        page_password: asked of everyone who opens the page; ``none`` asks nobody, whoever reaches it.
        max_upload_mb: largest file that a visitor of the page may upload.
        max_total_mb: all that visitors of the page leave, together.
        plugins: see `TrainConfig`.
        urls: see `TrainConfig`.
    """

    run_dir: str | None = None
    checkpoint: str = MISSING
    device: str = "auto"
    data_dir: str | None = None
    base: str | None = None
    encoders: dict[str, str] = field(default_factory=dict)
    text: str | None = None
    audio: str | None = None
    video: str | None = None
    history: str | None = None
    speaker: str | None = None
    reply_as: str | None = None
    num_replies: int = 1
    seed: int = 1
    out: str | None = None
    decoding: Any = MISSING
    speech: Any = None
    recogniser: str = MISSING
    max_clip_s: float = 60.0
    page: bool = False
    runs_dir: str = MISSING
    host: str = "127.0.0.1"
    port: int | None = None
    page_password: str | None = None
    max_upload_mb: int = 50
    max_total_mb: int = 2000
    plugins: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)


def _make_strict(node: DictConfig) -> None:
    """Let each switch be ``true`` or ``false``; OmegaConf takes 5, ``yes`` and ``t`` for true as well."""
    for key in node:
        child = node._get_node(key)
        if isinstance(child, BooleanNode):
            child._set_flag("convert", False)
        elif isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            _make_strict(child)


def register_schemas() -> None:
    """Put the schemas where the YAML files' defaults lists find them (``train_schema`` ...)."""
    store = ConfigStore.instance()
    # Hydra copies the store, of which there is one, whenever it composes, and for each group that --help lists: two
    # thirds of the latter's time. It changes no copy: what is loaded from the store is a copy of its own.
    ConfigStore.__deepcopy__ = lambda store, memo: store
    for name, schema in {
        "train_schema": TrainConfig,
        "prepare_schema": PrepareConfig,
        "evaluate_schema": EvaluateConfig,
        "report_schema": ReportConfig,
        "respond_schema": RespondConfig,
    }.items():
        node = OmegaConf.structured(schema)
        for path in OPEN.get(name, ()):
            OmegaConf.set_struct(OmegaConf.select(node, path), False)
        _make_strict(node)
        store.store(name=name, node=node)


def plain(node: Any) -> Any:
    """A config node as plain containers, interpolations resolved.

    Raises:
        MsencError: an interpolation that leads nowhere, or a key that no schema has: ``+key=value`` adds any.
    """
    if not OmegaConf.is_config(node):
        return node
    _check_schema(node)
    try:
        return OmegaConf.to_container(node, resolve=True)
    except Exception as e:
        if type(e).__module__.startswith("omegaconf"):
            where = getattr(e, "full_key", None) or "config"
            raise MsencError(f"{where}: {str(e).splitlines()[0]}") from e
        raise


def _check_schema(node: Any, path: str = "") -> None:
    if not OmegaConf.is_dict(node):
        return
    schema = OmegaConf.get_type(node)
    valid = schema.__dataclass_fields__ if is_dataclass(schema) else list(node)
    if is_dataclass(schema) and (gone := valid.keys() - set(node)):
        name = f"{path}.{min(gone)}".lstrip(".")
        raise MsencError(f"{name}: is needed, and was taken out. Leave out ~{name}, or give {name}=...")
    for key in node:
        name = f"{path}.{key}".lstrip(".")
        if key not in valid:
            raise MsencError(f"{name}: no such key.{nearest(str(key), valid)}")
        if not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
            _check_schema(node[key], name)
