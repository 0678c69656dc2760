"""Five numbers in a long text, each in words of its own that nothing was tuned on, asked for one after the other from one reading.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node=2 launch/examples/wordings.py TOKENS [KEY.SUB=VALUE ...]

Two texts of TOKENS tokens of the King James Bible, so that the ten numbers lie at ten depths. Prints a line of JSON a text.
"""

import gzip
import json
import random
import sys
from pathlib import Path

from ringctx import Ring
from ringctx.config import load
from ringctx.runtime.answer import Listener
from ringctx.runtime.engine import Engine
from ringctx.tools.eval.asking import ANSWER_TOKENS, ask
from ringctx.tools.eval.planting import Hidden, Question, plant
from ringctx.tools.eval.wordings import HELD_OUT, WORDINGS

HERE = Path(__file__).parent
DEPTHS = ((0.02, 0.23, 0.45, 0.66, 0.87), (0.13, 0.34, 0.55, 0.77, 0.98))

length, overrides = int(sys.argv[1]), sys.argv[2:]
config = load(HERE.parent.parent / "configs" / "smollm2_million.yaml", (f"generation.max_new_tokens={ANSWER_TOKENS}", *overrides))
book = gzip.decompress((HERE.parent / "documents" / "kjv.txt.gz").read_bytes()).decode()

with Ring.from_env(timeout=config.ring.timeout) as ring:
    engine = Engine.load(config, ring)
    for seed, depths in enumerate(DEPTHS):
        names = (*HELD_OUT[seed:], *HELD_OUT[:seed])  # so that no wording lies twice at about the same depth
        numbers = [str(n) for n in random.Random(seed).sample(range(10_000, 100_000), len(names))]
        said = [WORDINGS[name] for name in names]
        sentences = tuple((depth, w.needle.format(of="", number=n)) for depth, w, n in zip(depths, said, numbers, strict=True))
        questions = tuple(Question(w.question.format(of=""), w.beginning.format(of=""), n) for w, n in zip(said, numbers, strict=True))
        found = ask(engine, plant(engine, book, length, Hidden(sentences, questions), seed), Listener())
        rows = [
            {"depth": depth, "wording": name, "number": number, "answer": answer, "correct": is_correct}
            for depth, name, number, answer, is_correct in zip(depths, names, numbers, found.answers, found.are_correct, strict=True)
        ]
        if ring.rank == 0:
            print(json.dumps({"length": found.prompt_tokens, "found": sum(found.are_correct), "needles": rows, **found.cost}), flush=True)
