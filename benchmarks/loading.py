"""Dialogues per second: msenc's loader, one file per utterance, raw reading, and a model that consumes them.

    python benchmarks/loading.py [--quick] [--repetitions N] [--json FILE] [--device cuda]

The dialogues have MELD's real lengths where MSENC_SHARED names a folder with MELD's annotations, else lengths drawn
to the same statistics. Features are random, in the form of WavLM-large (1024 wide, 50 frames/s) and CLIP (512 wide,
3 frames/s). All files have just been written, so they come from the page cache and not from a disk: what is measured
is the work per byte, which a slow disk adds to.

- ``upstream``: float32, pictures at 30 frames/s, one file per utterance and stream (``torch.save``), read again for
  every later target; the last 800 frames of sound and 50 of pictures are kept, padded to that length.
- ``one file per utterance``: the same reading of the same float16 features that msenc stores, pictures at 3 frames/s.
- ``msenc, N workers``: the training loader, epoch after epoch; a batch holds every target of its dialogues.
- ``msenc, first epoch``: a new data module each time, which opens and hashes the shards and tokenizes the turns.
- ``raw bytes``: all bytes of the tar files into one buffer, in order. Nothing can be faster.
- ``strict`` and ``plain``, in a table of their own: all turns of a larger set, by msenc's reader, which holds them to
  their format, and by ``json.loads`` alone.
- ``model``: forward and backward of a step with the smallest model that ``train.py`` offers (the demo's LLM with
  LoRA, the default Q-Former per stream). Larger ones consume less.
"""

import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from lightning.fabric.utilities import move_data_to_device
from measure import interleave, parser, print_table, summarise, time_rows, write_json
from meld import RATES, meld_dialogues, num_frames

from msenc.config.build import build
from msenc.config.messages import CONFIGS
from msenc.config.schema import plain, register_schemas
from msenc.store.manifest import DatasetManifest, StreamInfo, count_splits
from msenc.store.shards import INDEX, ShardReader, write_stream
from msenc.training.assembly import build_datamodule, build_model
from msenc.types import Dialogue

UPSTREAM_RATES = {"audio": 50, "video": 30}
WINDOWS = {"audio": 800, "video": 50}  # frames that upstream keeps of a history
UPSTREAM_BATCH = 4


def main() -> None:
    known = parser(__doc__)
    known.add_argument("--device", default="cpu", help="where the model runs; default: %(default)s")
    arguments = known.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    dialogues = meld_dialogues(12 if arguments.quick else 96)
    with tempfile.TemporaryDirectory(prefix="msenc-loading-") as name:
        measure(arguments, dialogues, Path(name))


def measure(arguments: Any, dialogues: list[Dialogue], folder: Path) -> None:
    config = configure(folder, "text_audio_video")
    write_prepared(folder / "meld", dialogues, config)
    write_utterances(folder / "upstream", dialogues, config, UPSTREAM_RATES, torch.float32)
    write_utterances(folder / "utterances", dialogues, config, RATES, torch.float16)
    build(config["model"]["llm_recipe"], "model.llm_recipe")
    loaders = {workers: new_loader(folder, "text_audio_video", workers) for workers in (0, 2)}
    text_loader = new_loader(folder, "text", 0)
    fresh = iter([new_loader(folder, "text_audio_video", 0) for _ in range(arguments.repetitions + 1)])
    tars = sorted((folder / "meld").rglob("*.tar"))
    variants: dict[str, Callable[[], Any]] = {
        "upstream": lambda: drain(read_utterances(folder / "upstream", dialogues, RATES)),
        "one file per utterance": lambda: drain(read_utterances(folder / "utterances", dialogues, {})),
        "msenc, 0 workers": lambda: drain(loaders[0]),
        "msenc, 2 workers": lambda: drain(loaders[2]),
        "msenc, first epoch": lambda: drain(next(fresh)),
        "msenc, text only": lambda: drain(text_loader),
        "raw bytes": lambda: read_raw(tars),
        "model": consumer(config, list(itertools.islice(loaders[0], 4 if arguments.quick else 12)), arguments.device),
    }
    opened = note_opened()
    variants["msenc, text only"]()
    media_shards = [name for name in opened if name.endswith(".tar") and "/turns/" not in name]
    seconds = interleave(variants, arguments.repetitions)
    num = dict.fromkeys(variants, len(dialogues)) | {"model": variants["model"].num_dialogues}
    per_dialogue = {name: [s / num[name] for s in values] for name, values in seconds.items()}
    results = summarise(per_dialogue, "msenc, 0 workers")
    rates = {name: 1 / t["median"] for name, t in results["seconds"].items()}
    targets = sum(dialogue.num_samples for dialogue in dialogues)
    num_bytes = {
        "msenc": sum(path.stat().st_size for path in tars),
        **{name: sum(p.stat().st_size for p in (folder / name).rglob("*.pt")) for name in ("upstream", "utterances")},
    }
    print_table(
        f"Loading {len(dialogues)} dialogues of {targets:,} targets, {num_bytes['msenc'] / 2**20:,.0f} MiB of shards "
        f"({num_bytes['upstream'] / 2**20:,.0f} MiB in upstream's form), from the page cache",
        ["variant", "dialogues/s", "slowest", "fastest", "0 workers / this", "2 workers / this"],
        [
            [name, rate, 1 / t["max"], 1 / t["min"], rates["msenc, 0 workers"] / rate, rates["msenc, 2 workers"] / rate]
            for (name, rate), t in zip(rates.items(), results["seconds"].values(), strict=True)
        ],
        arguments.device,
    )
    print(f"Shards of sound or pictures that the text-only loader opened: {len(media_shards)}")
    turns = measure_turns(folder / "turns", dialogues, arguments)
    extra = {
        "turns": turns,
        "dialogues_per_s": rates,
        "bytes": num_bytes,
        "dialogues": len(dialogues),
        "targets": targets,
    }
    write_json(arguments.json, {**results, **extra, "media_shards_opened_by_text": len(media_shards)}, arguments.device)


def measure_turns(folder: Path, dialogues: list[Dialogue], arguments: Any) -> dict[str, Any]:
    """What reading the turns costs beyond parsing them."""
    count, per_copy = 2_000 if arguments.quick else 100_000, sum(len(d.utterances) for d in dialogues)
    copies = [replace(d, id=f"{d.id}-{copy}") for copy in range(-(-count // per_copy)) for d in dialogues]
    write_stream(folder, ((d.id, d.split, {"turns.json": d.to_json()}) for d in copies), {})
    readers = {
        "strict": lambda: drain(ShardReader(folder, copies[0].split, verify=False)),
        "plain": lambda: read_plain(folder),
    }
    results = summarise(interleave(readers, arguments.repetitions), "plain")
    title = f"Reading {sum(len(d.utterances) for d in copies):,} turns of {len(copies):,} dialogues, in seconds"
    print_table(title, ["reader", "median", "fastest", "slowest", "this / plain"], time_rows(results, "plain"))
    return results


def read_plain(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    shards = [os.open(folder / shard["file"], os.O_RDONLY) for shard in index["shards"]]
    for sample in index["samples"]:
        offset, size = sample["members"]["turns.json"]
        json.loads(os.pread(shards[sample["shard"]], size, offset))
    for descriptor in shards:
        os.close(descriptor)


def configure(folder: Path, modality: str, workers: int = 0) -> dict[str, Any]:
    """MELD's config with WavLM's and CLIP's features, as ``train.py`` composes it."""
    register_schemas()
    media = ["model/audio=wavlm", "model/video=clip"] if modality != "text" else []
    tiny = ["model.llm_recipe.num_dialogues=64", "model.llm_recipe.attempts=1"]
    own = [f"paths.data_dir={folder}", f"data.num_workers={workers}", *tiny]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", ["data=meld", f"modality={modality}", *media, *own, f"paths.output_dir={folder}"])
    return plain(cfg)


def write_prepared(folder: Path, dialogues: list[Dialogue], config: dict[str, Any]) -> None:
    """What ``prepare.py`` leaves, with random features."""
    index = write_stream(folder / "turns", ((d.id, d.split, {"turns.json": d.to_json()}) for d in dialogues), {})
    utterances = {"train": sum(len(d.utterances) for d in dialogues)}
    infos = {}
    for kind, stream in config["model"]["streams"].items():
        samples = ((d.id, d.split, features(d, kind, stream["dim"])) for d in dialogues)
        name = f"{kind}-{stream['name']}"
        hash = write_stream(folder / name, samples, stream["encoder"])["hash"]
        infos[name] = StreamInfo(kind, stream["name"], stream["dim"], stream["encoder"], hash, utterances)
    DatasetManifest("meld", count_splits(dialogues), infos, turns_hash=index["hash"]).write(folder)


def features(dialogue: Dialogue, kind: str, dim: int) -> dict[str, np.ndarray]:
    lengths = [num_frames(utterance, RATES[kind]) for utterance in dialogue.utterances]
    values = np.random.default_rng(0).standard_normal((sum(lengths), dim), dtype=np.float32).astype(np.float16)
    return {"features.npy": values, "offsets.npy": np.concatenate([[0], np.cumsum(lengths)])}


def write_utterances(
    folder: Path, dialogues: list[Dialogue], config: dict[str, Any], rates: dict[str, int], dtype: torch.dtype
) -> None:
    folder.mkdir()
    for d, dialogue in enumerate(dialogues):
        for u, utterance in enumerate(dialogue.utterances):
            for kind, stream in config["model"]["streams"].items():
                values = torch.randn(num_frames(utterance, rates[kind]), stream["dim"], dtype=dtype)
                torch.save(values, folder / f"{kind}-{d}-{u}.pt")


def read_utterances(
    folder: Path, dialogues: list[Dialogue], kept_rates: dict[str, int]
) -> Iterator[dict[str, torch.Tensor]]:
    """One sample per target, each with all utterances before it read anew; in padded batches."""
    samples = []
    for d, dialogue in enumerate(dialogues):
        for target in range(1, len(dialogue.utterances)):
            sample = {}
            for kind, window in WINDOWS.items():
                step = UPSTREAM_RATES[kind] // kept_rates.get(kind, UPSTREAM_RATES[kind])
                history = [torch.load(folder / f"{kind}-{d}-{u}.pt")[::step] for u in range(target)]
                kept = torch.cat(history)[-window:]
                sample[kind] = torch.zeros(window, kept.shape[1], dtype=kept.dtype)
                sample[kind][: len(kept)] = kept
            samples.append(sample)
            if len(samples) == UPSTREAM_BATCH:
                yield {kind: torch.stack([s[kind] for s in samples]) for kind in WINDOWS}
                samples = []


def new_loader(folder: Path, modality: str, workers: int) -> Any:
    datamodule = build_datamodule(configure(folder, modality, workers), "")
    datamodule.setup()
    return datamodule.train_dataloader()


def drain(batches: Any) -> None:
    for _ in batches:
        pass


def read_raw(paths: list[Path]) -> None:
    buffer = bytearray(2**20)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def consumer(config: dict[str, Any], batches: list[Any], device: str) -> Callable[[], None]:
    """Steps of the model over batches that are in its memory already."""
    model = build_model(config).train().to(device)
    batches = [move_data_to_device(batch, torch.device(device)) for batch in batches]

    def run() -> None:
        for batch in batches:
            model.zero_grad()
            loss = model(batch).nll.sum()
            loss.backward()
        loss.item()  # waits for a GPU

    run.num_dialogues = len({id for batch in batches for id, _ in batch.target_ids})
    return run


def note_opened() -> list[str]:
    """Names of the files that this process opens from now on."""
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    return opened


if __name__ == "__main__":
    main()
