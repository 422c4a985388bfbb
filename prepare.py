"""Raw clips and annotations -> shards: python prepare.py data=demo|meld [data.root=FOLDER] [modality=...].

With stage=audit: find defects in them.
"""

from msenc.commands import run

if __name__ == "__main__":
    run("prepare")
