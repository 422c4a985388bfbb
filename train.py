"""Train one run, or a sweep: python train.py [-m] [modality=...] [key=value ...]. See configs/train.yaml."""

from msenc.work.signals import listen_from_start

listen_from_start()  # before the other imports, which take a second or, from a busy network disk, a minute

from msenc.commands import run

if __name__ == "__main__":
    run("train")
