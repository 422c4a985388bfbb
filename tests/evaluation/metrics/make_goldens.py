"""Writes goldens.json: pairs of texts, and what reference implementations that are no dependency make of them.

    pip install --no-deps --target REFERENCES pycocoevalcap==1.2 bert-score==0.3.13 sentence-transformers==6.2.0
    PYTHONPATH=REFERENCES MSENC_MODELS=FOLDER NLTK_DATA=FOLDER python tests/evaluation/metrics/make_goldens.py

bert-score and sentence-transformers need matplotlib, requests, scikit-learn, scipy and narwhals there too; NLTK_DATA
holds WordNet 3.0 (corpora/wordnet).
"""

import json
import os
from pathlib import Path
from random import Random

OPENERS = ["Oh no", "Well", "Hey", "Look", "Right", "Ünglaublich", "D'accord", "No, no, no", "¿Qué", "Okay"]
SUBJECTS = ["you", "he", "my sister's dog", "Dr. Müller", "nobody", "the (other) guy", "Zoë", "we", "それ"]
VERBS = ["looks happy", "walked home", "doesn't know", "is running late", "ran into her ex", 'said "maybe"']
ENDS = ["today", "again", "with 3.5 dollars", "at 10:30", "[laughs]", "(a woman speaks fast)", "— really", "😀", ""]
MARKS = [".", "!", "?", "...", "?!", " .", ""]


def make_pairs(number: int = 240) -> list[tuple[str, str]]:
    """(reply, reference): sentences alike and unlike, empty ones, brackets, letters beyond ASCII, repetitions."""
    rng = Random(5)
    pairs = []
    for i in range(number):
        reference = sentence(rng)
        words = reference.split()
        kind = i % 8
        if kind == 0:
            reply = reference
        elif kind == 1:
            reply = " ".join(w for w in words if rng.random() > 0.3)
        elif kind == 2:
            rng.shuffle(words)
            reply = " ".join(words)
        elif kind == 3:
            reply = sentence(rng) + " " + sentence(rng)
        elif kind == 4:
            reply = " ".join(rng.choice(words) if rng.random() < 0.4 else w.lower() for w in words)
        elif kind == 5:
            reply = f"{reference} {reference}  {words[0]}"
        elif kind == 6:
            reply = reference.replace("walked", "walks").replace("looks", "looking").replace("happy", "glad")
        else:
            reply = sentence(rng)
        if i % 40 == 7:
            reply = ""
        if i % 60 == 13:
            reference = ""
        pairs.append((reply, reference))
    return pairs


def sentence(rng: Random) -> str:
    """One turn."""
    parts = [rng.choice(SUBJECTS), rng.choice(VERBS), rng.choice(ENDS)]
    if rng.random() < 0.5:
        parts.insert(0, rng.choice(OPENERS) + ",")
    if rng.random() < 0.2:
        parts += ["and", rng.choice(SUBJECTS), rng.choice(VERBS)]
    text = " ".join(filter(None, parts)) + rng.choice(MARKS)
    return text[0].upper() + text[1:]


def main() -> None:
    """Score the pairs by the references."""
    import bert_score
    from nltk.translate.meteor_score import single_meteor_score
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from sentence_transformers import SentenceTransformer, models, util

    pairs = make_pairs()
    replies, references = map(list, zip(*pairs, strict=True))
    given = {i: [text] for i, text in enumerate(references)}, {i: [text] for i, text in enumerate(replies)}
    encoder = str(Path(os.environ["MSENC_MODELS"]).expanduser() / "all-minilm-l6-v2")
    bert_score.utils.sent_encode = sent_encode
    transformer = models.Transformer(encoder)
    embedder = SentenceTransformer(modules=[transformer, models.Pooling(384, "mean"), models.Normalize()], device="cpu")
    goldens = {
        "made_by": "tests/evaluation/metrics/make_goldens.py",
        "bleu": [float(v) for v in Bleu().compute_score(*given, verbose=0)[0]],
        "cider": [float(v) for v in Cider().compute_score(*given)[1]],
        "meteor": [single_meteor_score(b.split(), a.split()) for a, b in pairs],
        "embedding_similarity": util.pairwise_cos_sim(
            *(embedder.encode(side) for side in (replies, references))
        ).tolist(),
        "bertscore": bert_score.score(
            replies, references, model_type=encoder, num_layers=5, rescale_with_baseline=False, device="cpu"
        )[2].tolist(),
        "pairs": pairs,
    }
    (Path(__file__).parent / "goldens.json").write_text(
        json.dumps(goldens, ensure_ascii=False, indent=0) + "\n", encoding="utf-8"
    )


def sent_encode(tokenizer, text: str) -> list[int]:
    """What bert-score's own does, without a method that transformers 5 has no more."""
    return tokenizer.encode(text.strip(), add_special_tokens=True, truncation=True)


if __name__ == "__main__":
    main()
