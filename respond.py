"""Let a trained run reply, in words and sound: python respond.py run_dir=RUN text="Hello!" [audio=...] [video=...]."""

from msenc.commands import run

if __name__ == "__main__":
    run("respond")
